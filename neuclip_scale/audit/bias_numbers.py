"""How the numbers of missing samples differ from those of kept ones: moments, exact D and quantiles, histograms.

An engine sorts and counts; a few hundred rows a column come to Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from neuclip_scale.audit.bias_columns import Column
from neuclip_scale.audit.statistics import (
    Size,
    ks_p_value,
    mean_difference,
    size_of_distance,
    size_of_mean_difference,
)

if TYPE_CHECKING:
    import ibis.expr.types as ir

PER_MILLE = (10, 50, 250, 500, 750, 950, 990)
"""Quantiles that are told, in thousandths."""

ROWS_PER_BUCKET = 2_000_000
MAX_BUCKETS = 64
MAX_BINS = 40


@dataclass(frozen=True)
class Summary:
    """The numbers of one side: those that are neither NULL, NaN, infinite nor beyond 1e100."""

    n: int
    mean: float
    deviation: float | None
    """Sample standard deviation; None for one number."""
    minimum: float
    maximum: float
    quantiles: dict[str, float]
    """`p5` -> the least value with 5 % of the numbers at or below it."""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, the last bin closed; the bins hold the middle 99 % of all numbers, `below` and `above` the
    rest. A number within rounding of an edge may stand on either side of it."""

    edges: tuple[float, ...]
    kept: tuple[int, ...]
    missing: tuple[int, ...]
    below: tuple[int, int]
    """Kept and missing numbers left of the bins."""
    above: tuple[int, int]


@dataclass(frozen=True)
class NumberBias:
    """A numeric column of the missing samples against that of the kept ones."""

    column: str
    kept: Summary
    missing: Summary
    mean_difference: float | None
    """Missing minus kept over the pooled deviation (Cohen's d); None where a side has one number."""
    size: Size
    """Plain word for it; where it is None, for `distance`."""
    distance: float
    """Kolmogorov-Smirnov D, exact."""
    shape: Size
    """Plain word for D, which also sees differences of spread and shape."""
    p: float
    """Of D."""
    q: float
    """p after Benjamini-Hochberg over all columns."""
    histogram: Histogram

    def sentence(self) -> str:
        """The difference in words."""
        told = "" if self.mean_difference is None else f"standardised difference {self.mean_difference:+.3g}, "
        return (
            f"{self.column}: mean {self.missing.mean:.6g} where missing, {self.kept.mean:.6g} where kept "
            f"({told}{self.size}; D = {self.distance:.3g}, {self.shape}; q = {self.q:.2g})"
        )


class Moments(NamedTuple):
    """One side of a numeric column as the first query counts it."""

    n: int
    mean: float
    variance: float | None
    minimum: float
    maximum: float
    num_null: int
    num_nan: int
    num_beyond: int


def moment_columns(table: ir.Table, column: Column) -> dict[str, ir.Value]:
    """Aggregates that `moments` reads, for the one query over all columns."""
    raw, given, name = table[column.alias], table[f"{column.alias}_given"], column.alias
    return {
        f"{name}_any": raw.count(),
        f"{name}_nan": raw.isnan().ifelse(1, 0).sum(),
        f"{name}_n": given.count(),
        f"{name}_mean": given.mean(),
        f"{name}_var": given.var(how="sample"),
        f"{name}_min": given.min(),
        f"{name}_max": given.max(),
    }


def moments(row: dict[str, Any], column: Column) -> Moments:
    """One side's moments from its row of that query, whose `rows` is the number of samples."""
    name = column.alias
    n, given, num_nan = int(row[f"{name}_n"]), int(row[f"{name}_any"]), int(row[f"{name}_nan"] or 0)
    mean, least, most = (float(row[f"{name}_{what}"]) if n else math.nan for what in ("mean", "min", "max"))
    variance = max(0.0, float(row[f"{name}_var"])) if n > 1 else None
    return Moments(n, mean, variance, least, most, int(row["rows"]) - given, num_nan, given - num_nan - n)


def bucket_edges(table: ir.Table, columns: Sequence[tuple[Column, int]], rows: int) -> dict[str, list[float]]:
    """Alias -> limits that cut its numbers (`columns` says how many each has) in parts of about `rows`.

    From the engine's approximate quantiles: where the cuts lie changes the work of the engine, never a result.
    """
    parts = {column.alias: min(MAX_BUCKETS, -(-count // rows)) for column, count in columns}
    asked = {
        alias: table[f"{alias}_given"].approx_quantile([i / count for i in range(1, count)])
        for alias, count in parts.items()
        if count > 1
    }
    found = table.aggregate(**asked).to_pyarrow().to_pylist()[0] if asked else {}
    return {alias: sorted(set(map(float, found.get(alias, ())))) for alias in parts}


def compare_numbers(
    table: ir.Table, column: Column, kept: Moments, missing: Moments, edges: Sequence[float]
) -> NumberBias:
    """Compare one column that has numbers on both sides; its q is that of one test alone."""
    given = table[f"{column.alias}_given"]
    values = table.select(kept=table.kept, value=given).filter(given.notnull())
    values = values.mutate(bucket=sum((values.value > edge).ifelse(1, 0) for edge in edges))
    distance, (of_kept, of_missing, of_all) = _order_statistics(values, (kept.n, missing.n), bool(edges))
    low, high = min(kept.minimum, missing.minimum), max(kept.maximum, missing.maximum)
    smd = None
    if kept.variance is not None and missing.variance is not None:
        smd = mean_difference(kept.mean, kept.variance, missing.mean, missing.variance)
    p = ks_p_value(distance, kept.n, missing.n)
    return NumberBias(
        column=column.name,
        kept=_summary(kept, of_kept),
        missing=_summary(missing, of_missing),
        mean_difference=smd,
        size=size_of_distance(distance) if smd is None else size_of_mean_difference(smd),
        distance=distance,
        shape=size_of_distance(distance),
        p=p,
        q=p,
        histogram=_histogram(values, _bins(low, high, of_all[5], of_all[995], column.whole)),
    )


def _summary(side: Moments, quantiles: dict[int, float]) -> Summary:
    deviation = None if side.variance is None else math.sqrt(side.variance)
    named = {f"p{part / 10:g}": quantiles[part] for part in PER_MILLE}
    return Summary(side.n, side.mean, deviation, side.minimum, side.maximum, named)


def _order_statistics(
    values: ir.Table, sizes: tuple[int, int], cut: bool
) -> tuple[float, tuple[dict[int, float], dict[int, float], dict[int, float]]]:
    """D, and the quantiles of kept, missing and all numbers, from running counts within each bucket.

    Within a bucket the two distribution functions differ by what they differed by before it, plus the running counts.
    """
    counts = values.group_by(["bucket", "value"]).agg(kept=_count(values.kept), missing=_count(~values.kept))
    before = {0: (0, 0)}
    totals = {0: sizes}
    if cut:
        sums = values.group_by("bucket").agg(kept=_count(values.kept), missing=_count(~values.kept))
        totals = {row["bucket"]: (int(row["kept"]), int(row["missing"])) for row in sums.to_pyarrow().to_pylist()}
        running = (0, 0)
        for bucket in sorted(totals):
            before[bucket] = running
            running = (running[0] + totals[bucket][0], running[1] + totals[bucket][1])
    frame: dict[str, Any] = {"rows": (None, 0), "group_by": "bucket", "order_by": "value"}
    table = counts.mutate(kept=counts.kept.sum().over(**frame), missing=counts.missing.sum().over(**frame))
    table = table.mutate(all=table.kept + table.missing)
    gap = table.kept.cast("float64") / sizes[0] - table.missing.cast("float64") / sizes[1]
    places = _places(before, totals, sizes)
    at_rank = {
        f"{side}_{part}": table.value.min(where=(table.bucket == bucket) & (table[side] >= rank))
        for (side, part), (bucket, rank) in places.items()
    }
    rows = table.group_by("bucket").agg(low=gap.min(), high=gap.max(), **at_rank).to_pyarrow().to_pylist()
    distance = 0.0
    for row in rows:
        kept, missing = before[row["bucket"]]
        offset = kept / sizes[0] - missing / sizes[1]
        distance = max(distance, abs(offset + row["low"]), abs(offset + row["high"]))
    of_bucket = {row["bucket"]: row for row in rows}
    quantiles: dict[str, dict[int, float]] = {"kept": {}, "missing": {}, "all": {}}
    for (side, part), (bucket, _) in places.items():
        quantiles[side][part] = float(of_bucket[bucket][f"{side}_{part}"])
    return min(1.0, distance), (quantiles["kept"], quantiles["missing"], quantiles["all"])


def _places(
    before: dict[int, tuple[int, int]], totals: dict[int, tuple[int, int]], sizes: tuple[int, int]
) -> dict[tuple[str, int], tuple[int, int]]:
    """(side, thousandths) -> bucket of that quantile, and its rank within the bucket."""
    count_of = {"kept": lambda pair: pair[0], "missing": lambda pair: pair[1], "all": sum}
    asked = [(side, part) for side in ("kept", "missing") for part in PER_MILLE] + [("all", 5), ("all", 995)]
    found = {}
    for side, part in asked:
        count = count_of[side]
        rank = max(1, -(-count(sizes) * part // 1000))
        bucket = min(b for b in totals if count(before[b]) + count(totals[b]) >= rank)
        found[side, part] = bucket, rank - count(before[bucket])
    return found


def _bins(low: float, high: float, inner_low: float, inner_high: float, whole: bool) -> list[float]:
    """Edges of at most `MAX_BINS` bins over the middle 99 % of numbers in [low, high], or over all that are near it."""
    if inner_low == inner_high:
        inner_low, inner_high = low, high
    margin = 0.1 * (inner_high - inner_low)
    begin = low if low >= inner_low - margin else inner_low
    end = high if high <= inner_high + margin else inner_high
    if whole:  # bins of equally many whole numbers, or every other one would look empty
        width = float(math.ceil((end - begin + 1) / MAX_BINS))
        begin -= 0.5
        count = math.ceil((end + 0.5 - begin) / width)
    else:
        count = MAX_BINS
        width = (end - begin) / count
    edges = [begin + width * i for i in range(count + 1)]
    if not whole:
        edges[-1] = end
    return edges if all(left < right for left, right in itertools.pairwise(edges)) else [begin, end]


def _histogram(values: ir.Table, edges: list[float]) -> Histogram:
    last, begin, end = len(edges) - 1, edges[0], edges[-1]
    width = (end - begin) / last
    inside = ((values.value.clip(begin, end) - begin) / width).floor().cast("int64").clip(0, last - 1)
    place = (values.value < begin).ifelse(-1, (values.value > end).ifelse(last, inside))
    placed = values.mutate(bin=place.cast("int64"))
    rows = placed.group_by("bin").agg(kept=_count(placed.kept), missing=_count(~placed.kept)).to_pyarrow().to_pylist()
    counts = {row["bin"]: (int(row["kept"]), int(row["missing"])) for row in rows}
    bins = [counts.get(i, (0, 0)) for i in range(last)]
    return Histogram(
        tuple(edges),
        tuple(kept for kept, _ in bins),
        tuple(missing for _, missing in bins),
        counts.get(-1, (0, 0)),
        counts.get(last, (0, 0)),
    )


def _count(condition: ir.BooleanValue) -> ir.IntegerScalar:
    return condition.ifelse(1, 0).sum()
