"""Hosts that changed most of their pictures: sold or hijacked domains show training another web than its reviewers saw.

Split-view poisoning (Carlini et al. 2023, "Poisoning Web-Scale Training Datasets is Practical") buys domains that a
published list points to. A host whose pictures were all compressed anew shows up here too; `num_different` tells them
apart where `--deep` was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from neuclip_scale.queries.engines import Engine

MIN_CHANGED = 5
"""Changed pictures of a host that is listed."""
FACTOR = 2.0
"""How many times the share of all other hosts the lower bound of the host's share must be."""
MIN_SHARE = 0.2
"""What the lower bound must be in any case."""
CONFIDENCE_Z = NormalDist().inv_cdf(0.9995)
"""Two-sided 99.9 %: millions of hosts are looked at, and few of them should be here by chance."""

MAX_LISTED = 200


@dataclass(frozen=True)
class HostChange:
    """A host with far more changed pictures than the others have."""

    host: str
    num_checked: int
    """Samples whose content could be compared."""
    num_changed: int
    share: float
    low: float
    """Of Wilson's interval of the share at 99.9 %."""
    high: float
    num_different: int | None = None
    """Of the changed, those that look otherwise; None without `--deep`. Those that could not be seen are not in it."""


@dataclass(frozen=True)
class MassChanges:
    """The hosts with most changed pictures among those that stand out."""

    listed: tuple[HostChange, ...]
    num_hosts: int
    num_samples: int
    """Changed samples of all such hosts."""
    overall_share: float
    """Changed of all that could be checked."""


def host_changes(engine: Engine, judged: Any, tiers: Any | None = None) -> Any:
    """A table of the hosts that stand out: the columns of `HostChange`.

    `judged` is a table of `changes.verdicts`, `tiers` one of `changes.against_published`.
    """
    import ibis

    checked = judged.filter(judged.verdict != "unknown")
    hosts = checked.group_by("host").agg(
        num_checked=checked.count(), num_changed=(checked.verdict == "changed").cast("int64").sum()
    )
    whole = _whole(engine, judged)
    others = hosts.mutate(n=whole["checked"] - hosts.num_checked, c=whole["changed"] - hosts.num_changed)
    elsewhere = ibis.ifelse(others.n > 0, others.c / ibis.greatest(others.n, 1), 0.0)
    low, high = wilson_bounds(others.num_changed, others.num_checked, CONFIDENCE_Z)
    share = others.num_changed / others.num_checked
    table = others.mutate(share=share, low=low, high=high, least=ibis.greatest(FACTOR * elsewhere, MIN_SHARE))
    table = table.filter((table.num_changed >= MIN_CHANGED) & (table.low > table.least)).drop("n", "c", "least")
    if tiers is None:
        return table.mutate(num_different=ibis.null("int64"))
    different = tiers.group_by("host").agg(num_different=(tiers.tier == "different").cast("int64").sum())
    joined = table.left_join(different, "host").select(*table.columns, "num_different")
    return joined.mutate(num_different=joined.num_different.fill_null(0))


def find_mass_changes(engine: Engine, judged: Any, tiers: Any | None = None) -> MassChanges:
    """The hosts of `host_changes` with most changed samples, and sums."""
    import ibis

    table = host_changes(engine, judged, tiers)
    total = engine.rows(table.agg(hosts=table.count(), samples=table.num_changed.sum()))[0]
    rows = engine.rows(table.order_by([ibis.desc("num_changed"), "host"]).limit(MAX_LISTED))
    whole = _whole(engine, judged)
    share = whole["changed"] / whole["checked"] if whole["checked"] else 0.0
    return MassChanges(tuple(HostChange(**row) for row in rows), total["hosts"], total["samples"] or 0, share)


def wilson_bounds(successes: Any, total: Any, z: float) -> tuple[Any, Any]:
    """Wilson's score interval of a share, as Ibis columns; `total` is above 0."""
    import ibis

    total = total.cast("float64")
    centre = (successes + z * z / 2) / (total + z * z)
    spread = (successes * (total - successes) / total + z * z / 4).sqrt() * (z / (total + z * z))
    return ibis.greatest(centre - spread, 0.0), ibis.least(centre + spread, 1.0)


def _whole(engine: Engine, judged: Any) -> dict[str, int]:
    """Samples that could be checked, and the changed of them, of all hosts."""
    changed = (judged.verdict == "changed").cast("int64").sum()
    row = engine.rows(judged.agg(checked=(judged.verdict != "unknown").cast("int64").sum(), changed=changed))[0]
    return {name: int(value or 0) for name, value in row.items()}
