"""Whether the pictures are still those that were published: hashes, looks, placeholders and hosts that changed all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuclip_scale.audit import changes, placeholders
from neuclip_scale.audit.findings import percent
from neuclip_scale.audit.mass_changes import MassChanges, find_mass_changes
from neuclip_scale.audit.placeholders import Placeholders
from neuclip_scale.queries.engines import Engine


@dataclass(frozen=True)
class Fetched:
    """What is known of the pictures of one download."""

    originals: Any
    """See `changes.originals`; with `url`."""
    looks: Any | None
    """See `changes.looks`; None without `--deep`."""


@dataclass(frozen=True)
class Content:
    """The findings on one download's pictures."""

    counts: changes.ContentCounts
    tiers: changes.TierCounts | None
    placeholders: Placeholders
    mass_changes: MassChanges
    lists: dict[str, Any]
    """`changed` and `placeholder`, as queries with `uid`."""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checked": self.counts.same + self.counts.changed,
            **asdict(self.counts),
            "tiers": asdict(self.tiers) if self.tiers else None,
            "placeholders": asdict(self.placeholders),
            "mass_changes": asdict(self.mass_changes),
            "sentences": self.sentences(),
        }

    def sentences(self) -> list[str]:
        """The findings in words."""
        counts, told = self.counts, []
        checked = counts.same + counts.changed
        if checked:
            told.append(
                f"{checked:,} downloaded samples could be held against a published hash of the original bytes: "
                f"{counts.changed:,} have others ({percent(counts.changed / checked)})."
            )
        else:
            told.append(
                "No hash of original bytes is known on both sides, so what changed since publication is not known."
            )
        if self.tiers and counts.changed:
            named = ", ".join(f"{count:,} {tier}" for tier, count in asdict(self.tiers).items() if count)
            told.append(f"Of the changed: {named} (unseen: no download has the published picture).")
        if self.placeholders.num_samples:
            shown, least = self.placeholders, placeholders.MIN_URLS
            told.append(
                f"{shown.num_samples:,} samples show one of {shown.num_pictures:,} placeholder picture(s), which stand "
                f"behind {least} or more urls with as many different captions."
            )
        if self.mass_changes.num_hosts:
            named = ", ".join(
                f"{host.host} ({host.num_changed} of {host.num_checked})" for host in self.mass_changes.listed[:5]
            )
            told.append(
                f"{self.mass_changes.num_hosts:,} host(s) changed far more of their pictures than the others, as a "
                f"domain does that was sold or taken over: {named}. Look at them before training."
            )
        return told


def examine(
    engine: Engine, published: Any, fetched: Fetched, references: Sequence[Any], cache: Path, name: str
) -> Content:
    """Findings on one download. `references` are the looks of all downloads; `cache` keeps what is used twice."""
    verdicts = _kept(engine, changes.verdicts(published, fetched.originals), cache / f"verdicts-{name}.parquet")
    tiers = None
    if fetched.looks is not None:
        found = changes.against_published(verdicts, fetched.looks, references)
        tiers = _kept(engine, found, cache / f"tiers-{name}.parquet")
    captions = published.select("uid", "text") if "text" in published.columns else None
    samples = placeholders.placeholder_samples(placeholders.by_bytes(fetched.originals), captions)
    samples = _kept(engine, samples, cache / f"placeholders-{name}.parquet")
    changed = (
        verdicts.filter(verdicts.verdict == "changed").select("uid") if tiers is None else tiers.select("uid", "tier")
    )
    return Content(
        changes.count_verdicts(engine, verdicts),
        None if tiers is None else changes.count_tiers(engine, tiers),
        placeholders.find_placeholders(engine, samples),
        find_mass_changes(engine, verdicts, tiers),
        {"changed": changed, "placeholder": samples.select("uid", "content", "host")},
    )


def compare_looks(engine: Engine, first: Any, second: Any, path: Path) -> tuple[changes.TierCounts, Any]:
    """How samples look in two downloads whose bytes differ: counts, and a table with `uid` and `tier` at `path`."""
    table = _kept(engine, changes.between(first, second), path)
    return changes.count_tiers(engine, table), table


def _kept(engine: Engine, query: Any, path: Path) -> Any:
    if not path.exists():
        engine.save(query, path)
    return engine.parquet([path])
