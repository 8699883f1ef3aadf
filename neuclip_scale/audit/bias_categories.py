"""How missing samples spread over categories against kept ones; NULL, NaN and the infinite are categories too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from neuclip_scale.audit.bias_columns import BEYOND, Column
from neuclip_scale.audit.bias_numbers import Moments
from neuclip_scale.audit.statistics import Size, chi_square, size_of_association

if TYPE_CHECKING:
    import ibis.expr.types as ir

MAX_CATEGORIES = 50
LONG = 64
"""Characters; strings that are longer on average are texts, not categories."""
LEAST_COVERED = 0.05
"""Share of the rows that the most frequent categories must hold; below, nearly every value is its own."""
_LEAST_EXPECTED = 5.0
_SHOWN = 100


class CategoryRow(NamedTuple):
    """One category."""

    name: str
    kept: int
    missing: int
    residual: float
    """Adjusted standardised residual of the missing count: about N(0, 1) without a difference."""


@dataclass(frozen=True)
class CategoryBias:
    """The categories of missing samples against those of kept ones."""

    column: str
    about: Literal["values", "presence"]
    """Whether the categories are the column's values, or whether a number is given at all."""
    rows: tuple[CategoryRow, ...]
    """The most frequent first; those too rare for the test are pooled as `(other)`."""
    chi_square: float
    degrees: int
    p: float
    q: float
    """p after Benjamini-Hochberg over all columns."""
    cramers_v: float
    balanced_v: float
    """Cramer's V if as many samples were missing as are kept: a small missing share makes V itself small."""
    size: Size
    """Plain word for `balanced_v`."""
    smallest_expected: float

    def largest_residuals(self, count: int = 5) -> list[CategoryRow]:
        """Categories furthest from an equal share, the furthest first."""
        return sorted(self.rows, key=lambda row: -abs(row.residual))[:count]

    def sentence(self) -> str:
        """The difference in words."""
        first = self.largest_residuals(1)[0]
        missing, kept = sum(row.missing for row in self.rows), sum(row.kept for row in self.rows)
        return (
            f"{self.column}{' (is it given)' if self.about == 'presence' else ''}: "
            f"{first.name} is {first.missing / missing:.2%} of the missing and {first.kept / kept:.2%} of the kept "
            f"(V at equal sizes {self.balanced_v:.3g}, {self.size}; q = {self.q:.2g})"
        )


def category_columns(table: ir.Table, column: Column) -> dict[str, ir.Value]:
    """Aggregates that `compare_categories` reads, for the one query over all columns."""
    asked = {f"{column.alias}_n": table[f"{column.alias}_given"].ifelse(1, 0).sum()}
    if not column.derived:  # which are short, and dear to compute
        asked[f"{column.alias}_len"] = table[column.alias].length().sum()
    return asked


def compare_categories(
    table: ir.Table, column: Column, kept: dict[str, Any], missing: dict[str, Any]
) -> CategoryBias | str:
    """Compare one column, given both sides' rows of that query; returns the reason where that says nothing."""
    given = tuple(int(side[f"{column.alias}_n"]) for side in (kept, missing))
    nulls = int(kept["rows"]) - given[0], int(missing["rows"]) - given[1]
    if not sum(given):
        return "every value is NULL"
    length = sum(int(side.get(f"{column.alias}_len") or 0) for side in (kept, missing)) / sum(given)
    if length > LONG:
        return f"texts of {length:.0f} characters on average, no categories"
    found = _most_frequent(table, column)
    covered = sum(sum(pair) for _, pair in found)
    if covered < LEAST_COVERED * sum(given):
        return f"the {len(found)} most frequent values are {covered / sum(given):.2%} of the rows, no categories"
    rest = given[0] - sum(pair[0] for _, pair in found), given[1] - sum(pair[1] for _, pair in found)
    return compare_counts(column.name, "values", [*found, ("(NULL)", nulls)], rest)


def compare_presence(column: Column, kept: Moments, missing: Moments) -> CategoryBias | str:
    """Whether a number is as often given on both sides; a reason where it always or never is."""
    counts = [
        ("a number", (kept.n, missing.n)),
        ("NULL", (kept.num_null, missing.num_null)),
        ("NaN", (kept.num_nan, missing.num_nan)),
        (f"infinite or beyond {BEYOND:g}", (kept.num_beyond, missing.num_beyond)),
    ]
    return compare_counts(column.name, "presence", counts, (0, 0))


def compare_counts(
    column: str,
    about: Literal["values", "presence"],
    counts: list[tuple[str, tuple[int, int]]],
    other: tuple[int, int],
) -> CategoryBias | str:
    """Test (kept, missing) counts by category after pooling what is too rare; a reason where one category is left."""
    counts = [(name, pair) for name, pair in counts if any(pair)]
    sides = [sum(pair[i] for _, pair in counts) + other[i] for i in (0, 1)]
    least = min(sides) / sum(sides)
    frequent = []
    for name, pair in counts:
        # NULL and NaN keep their names: that they are rare is itself a finding.
        if about == "values" and sum(pair) * least < _LEAST_EXPECTED:
            other = other[0] + pair[0], other[1] + pair[1]
        else:
            frequent.append((name, pair))
    table = [*frequent, ("(other)", other)] if any(other) else frequent
    if len(table) < 2:
        only = table[0][0]
        return "no value is frequent enough to test" if only == "(other)" else f"every value is {_shown(only)}"
    result = chi_square([pair for _, pair in table])
    told = zip(table, result.residuals, strict=True)
    rows = (CategoryRow(_shown(name), *pair, residual) for (name, pair), residual in told)
    return CategoryBias(
        column, about, tuple(rows), result.statistic, result.degrees, result.p, result.p, result.cramers_v,
        result.balanced_v, size_of_association(result.balanced_v), result.smallest_expected,
    )  # fmt: skip


def _most_frequent(table: ir.Table, column: Column) -> list[tuple[str, tuple[int, int]]]:
    counts = table.group_by(name=table[column.alias]).agg(
        kept=table.kept.ifelse(1, 0).sum(), missing=table.kept.ifelse(0, 1).sum()
    )
    order = [(counts.kept + counts.missing).desc(), counts.name.asc()]
    # NULL is one group more; a filter before would compute a derived column twice.
    rows = counts.order_by(order).limit(MAX_CATEGORIES + 1).to_pyarrow().to_pylist()
    found = [(row["name"], (int(row["kept"]), int(row["missing"]))) for row in rows if row["name"] is not None]
    return found[:MAX_CATEGORIES]


def _shown(name: str) -> str:
    if not name:
        return "(empty)"
    return name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
