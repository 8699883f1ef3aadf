"""The score above which lies a given share of a pool: exact over any number of rows, in the memory of some thousand.

Histograms, each over the one bin of the last in which the cut must lie, until that bin holds few values. A row's bin is
a function of its score that never falls, so a bin is a range of scores, and its ends are scores that occur: rounding in
the arithmetic of an engine moves rows between bins, never the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip_scale.queries.engines import Engine
from neuclip_scale.queries.uids import normal_uids
from neuclip_scale.subset.filters import ClipScoreFilter
from neuclip_scale.subset.request import Columns

NUM_BINS = 4096
FEW = 4096
"""Distinct values that are taken one by one."""
LARGEST = 1e300
"""Scores beyond count as this, so that differences stay finite; infinite ones are among them."""


@dataclass(frozen=True)
class Cut:
    """Rows that score above `threshold` pass; of those that score it, those whose uid is not above `last_uid`."""

    threshold: float
    last_uid: str | None = None
    """None lets all of them pass."""
    num_rows: int = 0
    num_scored: int = 0
    """Rows with a score, neither null nor NaN."""
    num_above: int = 0
    num_equal: int = 0
    num_wanted: int = 0
    """Rows that the fraction stands for."""


def find_cut(engine: Engine, files: Sequence[Path], each: ClipScoreFilter, columns: Columns) -> Cut:
    """The cut of a filter with a fraction, over all rows of the parquets; raises `QueryError`."""
    assert each.fraction is not None
    table = engine.parquet(files)
    score = table[columns.score(each.arch)].cast("float64")
    rows = table.select(uid=table[columns.uid_column].cast("string"), score=score)
    num_rows = int(engine.rows(rows.agg(count=rows.count()))[0]["count"])
    is_scored = rows.score.notnull() & ~rows.score.isnan()
    scored = rows.filter(is_scored).mutate(score=rows.score.clip(-LARGEST, LARGEST))
    num_scored = int(engine.rows(scored.agg(count=scored.count()))[0]["count"])
    wanted = int(num_rows * each.fraction)
    rank = wanted + 1 if each.ties == "all" else wanted
    # The whole pool has no row after it, with which DataComp's code fails; keeping all is what it says.
    rank = min(rank, num_rows)
    if rank > num_scored:
        return Cut(-LARGEST, None, num_rows, num_scored, num_scored, 0, wanted)
    if rank == 0:
        return Cut(float("inf"), None, num_rows, num_scored, 0, 0, wanted)
    threshold, above, equal = rank_from_top(engine, scored, rank)
    last = None
    if each.ties == "uid" and above + equal > rank:
        last = _uid_at(engine, scored.filter(scored.score == threshold), rank - above)
    return Cut(threshold, last, num_rows, num_scored, above, equal, wanted)


def rank_from_top(engine: Engine, scored: Any, rank: int) -> tuple[float, int, int]:
    """The `rank`-th largest score (from 1), how many rows score more, and how many score it."""
    ends = engine.rows(scored.agg(low=scored.score.min(), high=scored.score.max(), count=scored.count()))[0]
    low, high, inside, above = float(ends["low"]), float(ends["high"]), int(ends["count"]), 0
    while True:
        if low == high:
            return low, above, inside
        part = scored.filter((scored.score >= low) & (scored.score <= high))
        width = (high - low) / NUM_BINS
        # A range this small, or with few rows, has few values.
        by_value = inside <= FEW or width == 0.0 or low + width == low
        group = part.score if by_value else ((part.score - low) / width).floor()
        binned = part.mutate(bin=group)
        bins = binned.group_by("bin")
        found = engine.rows(bins.agg(low=binned.score.min(), high=binned.score.max(), count=binned.count()))
        for each in sorted(found, key=lambda row: -float(row["low"])):
            count = int(each["count"])
            if above + count >= rank:
                low, high, inside = float(each["low"]), float(each["high"]), count
                break
            above += count
        else:
            raise AssertionError("fewer rows than were counted")


def _uid_at(engine: Engine, tied: Any, place: int) -> str:
    """The `place`-th smallest uid (from 1); sorted by the engine, which spills to the disk."""
    uids = tied.filter(tied.uid.notnull())
    query = uids.select(uid=normal_uids(uids.uid)).order_by("uid").limit(1, offset=place - 1)
    found = engine.rows(query)
    # Rows without a uid are never selected: then all tied ones with a uid are.
    return str(found[0]["uid"]) if found else "\U0010ffff"
