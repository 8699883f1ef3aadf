"""From numbers to sentences: what is a discrepancy by the thresholds given, and what is only worth knowing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuclip_scale.audit.pairs import Pair
from neuclip_scale.audit.request import Thresholds


@dataclass(frozen=True)
class Finding:
    """One sentence of the report."""

    code: str
    """`missing`, `orphaned`, ...: for programs."""
    subject: str
    """The download or pair it is about."""
    is_discrepancy: bool
    text: str


_SHARES = {
    "missing": "missing",
    "orphaned": "there, or were attempted, but not on the list",
    "duplicated": "there more than once",
    "corrupt": "there but cannot be used",
}


def findings_of_download(part: Mapping[str, Any], thresholds: Thresholds) -> Iterator[Finding]:
    """Sentences about one download's part of the document."""
    name, counts = part["name"], part["counts"]
    wanted = max(counts["wanted"], 1)
    for code, words in _SHARES.items():
        count = counts[code]
        if count:
            limit = getattr(thresholds, f"max_{code}")
            yield Finding(
                code,
                name,
                count / wanted > limit,
                f"{samples(count)} {words} ({percent(count / wanted)} of what is wanted).",
            )
    yield from _of_shards(name, part)
    for sentence in part["bias"]["sentences"][1:]:
        yield Finding("bias", name, False, f"What is missing differs. {sentence}.")
    content = part.get("content") or {}
    checked, changed = content.get("checked", 0), content.get("changed", 0)
    if changed:
        above = changed / checked > thresholds.max_changed
        share = percent(changed / checked)
        text = f"{changed:,} of {checked:,} checked samples have other bytes than were published ({share})."
        yield Finding("changed", name, above, text)
    for sentence in content.get("sentences", [])[1:]:
        yield Finding("content", name, False, sentence)


def _of_shards(name: str, part: Mapping[str, Any]) -> Iterator[Finding]:
    damaged = part["damaged_shards"]
    if damaged:
        shown = _some([f"{row['shard']} ({row['fault']})" for row in damaged])
        yield Finding("damaged_shards", name, True, f"{len(damaged):,} tar(s) or parquet(s) are damaged: {shown}.")
    outages = part["outages"]
    if outages:
        shown = _some(
            [f"{row['shard']} ({row['passing']} of {row['attempted']}, {row['main_reason']})" for row in outages]
        )
        text = f"{len(outages):,} shard(s) failed as a whole, an outage and not the rot of links: {shown}."
        yield Finding("outages", name, False, text)
    resolver = part["reasons"].get("resolver")
    if resolver:
        text = (
            f"{samples(resolver['count'])} lost because the resolver failed, or knew their hosts' names at other "
            "times. Run a resolver of your own (img2dataset's documentation shows how) and download these again."
        )
        yield Finding("resolver", name, False, text)


def notes_on(part: Mapping[str, Any], unidentified: int) -> Iterator[str]:
    """What limits the findings on a download: samples that could not be told apart as they should."""
    if part["known_by_key"]:
        yield (
            f"{part['name']}: {samples(part['known_by_key'])} known by their keys only, for neither json nor parquet "
            "tells more: they count as orphaned unless the list has the keys as uids."
        )
    if unidentified:
        yield f"{part['name']}: {unidentified:,} row(s) of its parquets have no uid or url, and are left out."


def findings_of_pair(pair: Pair, thresholds: Thresholds) -> Iterator[Finding]:
    """Sentences about two downloads."""
    if pair.jaccard < 1.0:
        text = (
            f"{pair.first} and {pair.second} hold different samples: {pair.common:,} in common, {pair.only_first:,} "
            f"only in {pair.first}, {pair.only_second:,} only in {pair.second} (Jaccard {pair.jaccard:.4f})."
        )
        subject = f"{pair.first} / {pair.second}"
        yield Finding("pair", subject, pair.jaccard < thresholds.min_jaccard, text)


def samples(count: int) -> str:
    """`1 sample is`, `2 samples are`."""
    return "1 sample is" if count == 1 else f"{count:,} samples are"


def percent(share: float) -> str:
    """`12.3 %`, never 0 or 100 for what is not."""
    value = 100 * share
    if 0 < value < 0.01:
        return "below 0.01 %"
    if 99.99 < value < 100:
        return "above 99.99 %"
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"


def _some(texts: Sequence[str], at_most: int = 5) -> str:
    more = f" and {len(texts) - at_most:,} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more
