"""The score above which lies a given share of a pool: exact over any number of rows, in the memory of some thousand.

Histograms, each over the one bin of the last in which the cut must lie, until that bin holds few values. A row's bin is
a function of its score that never falls, so a bin is a range of scores, and its ends are scores that occur: rounding in
the arithmetic of an engine moves rows between bins, never the cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    import ibis

    assert each.fraction is not None
    table = engine.parquet(files)
    raw = table[columns.score(each.arch)].cast("float64")
    # A null where there is no score: counts and extremes leave nulls out.
    score = (raw.notnull() & ~raw.isnan()).ifelse(raw.clip(-LARGEST, LARGEST), ibis.null("float64"))
    rows = table.select(uid=table[columns.uid_column].cast("string"), score=score)
    whole = engine.rows(
        rows.agg(rows=rows.count(), scored=rows.score.count(), low=rows.score.min(), high=rows.score.max())
    )[0]
    num_rows, num_scored = int(whole["rows"]), int(whole["scored"])
    wanted = int(num_rows * each.fraction)
    rank = wanted + 1 if each.ties == "all" else wanted
    # The whole pool has no row after it, with which DataComp's code fails; keeping all is what it says.
    rank = min(rank, num_rows)
    if rank > num_scored:
        return Cut(-LARGEST, None, num_rows, num_scored, num_scored, 0, wanted)
    if rank == 0:
        return Cut(math.inf, None, num_rows, num_scored, 0, 0, wanted)
    scored = rows.filter(rows.score.notnull())
    everything = _Range(float(whole["low"]), float(whole["high"]), num_scored)
    found, above = _narrow(engine, scored, everything, rank)
    last = None
    if each.ties == "uid" and above + found.num_rows > rank:
        last = _uid_at(engine, scored.filter(scored.score == found.low), rank - above)
    return Cut(found.low, last, num_rows, num_scored, above, found.num_rows, wanted)


class _Range(NamedTuple):
    low: float
    """Smallest score in it; it occurs, and so does the largest."""
    high: float
    num_rows: int


def _narrow(engine: Engine, scored: Any, here: _Range, rank: int) -> tuple[_Range, int]:
    """The one value that is the `rank`-th largest (from 1), and how many rows score more."""
    above = 0
    while here.low < here.high:
        for part in sorted(_parts(engine, scored, here), reverse=True):
            if above + part.num_rows >= rank:
                break
            above += part.num_rows
        else:
            raise AssertionError("fewer rows than were counted")
        assert part != here, "a bin that holds everything: the engine's arithmetic is wrong"
        here = part
    return here, above


def _parts(engine: Engine, scored: Any, here: _Range) -> list[_Range]:
    """A range cut into bins, or into its values where they are few."""
    inside = scored.filter((scored.score >= here.low) & (scored.score <= here.high))
    width = (here.high - here.low) / NUM_BINS
    # A range of few rows, or as small as rounding is, has few values.
    has_few = here.num_rows <= FEW or here.low + width == here.low
    binned = inside.mutate(bin=inside.score if has_few else ((inside.score - here.low) / width).floor())
    bins = binned.group_by("bin")
    found = engine.rows(bins.agg(low=binned.score.min(), high=binned.score.max(), count=binned.count()))
    return [_Range(float(row["low"]), float(row["high"]), int(row["count"])) for row in found]


def _uid_at(engine: Engine, tied: Any, place: int) -> str:
    """The `place`-th smallest uid (from 1); sorted by the engine, which spills to the disk."""
    uids = tied.filter(tied.uid.notnull())
    # No offset: Ibis has none on Spark that keeps the order.
    smallest = uids.select(uid=normal_uids(uids.uid)).order_by("uid").limit(place)
    last = engine.rows(smallest.agg(last=smallest.uid.max()))[0]["last"]
    # Rows without a uid are never selected: then all tied ones with a uid are.
    return "\U0010ffff" if last is None else str(last)
