"""Whether the samples that a download lacks are like those it has, column by column."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from neuclip_scale.audit.bias_categories import CategoryBias, category_columns, compare_categories, compare_presence
from neuclip_scale.audit.bias_columns import LeftOut, Narrow, narrow
from neuclip_scale.audit.bias_numbers import (
    ROWS_PER_BUCKET,
    NumberBias,
    bucket_edges,
    compare_numbers,
    moment_columns,
    moments,
)
from neuclip_scale.audit.statistics import benjamini_hochberg

if TYPE_CHECKING:
    import ibis.expr.types as ir

Test = NumberBias | CategoryBias


@dataclass(frozen=True)
class Bias:
    """All columns of a list, missing samples against kept ones."""

    num_kept: int
    num_missing: int
    numbers: tuple[NumberBias, ...]
    categories: tuple[CategoryBias, ...]
    left_out: tuple[LeftOut, ...]
    alpha: float
    """False-discovery rate below which a difference is told from chance."""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(found), "rows": [row._asdict() for row in found.rows]} for found in self.categories]
        return {
            "num_kept": self.num_kept,
            "num_missing": self.num_missing,
            "alpha": self.alpha,
            "numbers": [asdict(found) for found in self.numbers],
            "categories": rows,
            "left_out": [asdict(found) for found in self.left_out],
            "sentences": self.sentences(),
        }

    @property
    def tests(self) -> list[Test]:
        """All of them, numeric columns first."""
        return [*self.numbers, *self.categories]

    def differing(self) -> list[Test]:
        """Tests with q at most `alpha` whose difference is more than negligible, in the order of the columns."""
        return [found for found in self.tests if found.q <= self.alpha and not _negligible(found)]

    def sentences(self) -> list[str]:
        """What differs, in words; first how much was compared."""
        if not self.num_kept or not self.num_missing:
            return [f"{self.num_kept:,} samples are kept and {self.num_missing:,} are missing: nothing to compare."]
        differing = self.differing()
        first = (
            f"{len(self.tests)} tests of {self.num_missing:,} missing against {self.num_kept:,} kept samples: "
            f"{len(differing)} differ by more than a negligible size at a false-discovery rate of {self.alpha:g}."
        )
        return [first, *(found.sentence() for found in differing)]


def measure_bias(
    table: ir.Table,
    kept: str = "kept",
    *,
    leave_out: Collection[str] = (),
    alpha: float = 0.05,
    rows_per_bucket: int = ROWS_PER_BUCKET,
) -> Bias:
    """Compare every column of `table`, one row a uid, between rows with and without `kept`.

    Runs on the table's own engine, DuckDB or Spark: one query for the moments of all columns, then three for each
    numeric and one for each categorical column, which read that column alone. Give a table that is stored, not a
    long expression. `rows_per_bucket` bounds how many rows the engine sorts at a time and changes no result.
    Raises ValueError unless `kept` is a boolean column without NULL.
    """
    chosen = narrow(table, kept, leave_out)
    rows = _first_query(chosen)
    if None in rows:
        raise ValueError(f"kept = {kept!r}: NULL in {rows[None]['rows']:,} rows; say true or false of every sample")
    num_kept, num_missing = (int(rows[side]["rows"]) if side in rows else 0 for side in (True, False))
    if not num_kept or not num_missing:
        return Bias(num_kept, num_missing, (), (), chosen.left_out, alpha)
    numbers, presence, empty = _numbers(chosen, rows, rows_per_bucket)
    categories, no_categories = _categories(chosen, rows)
    left_out = (*chosen.left_out, *empty, *no_categories)
    return _corrected(Bias(num_kept, num_missing, tuple(numbers), (*categories, *presence), left_out, alpha))


def _first_query(chosen: Narrow) -> dict[bool | None, dict[str, Any]]:
    """kept -> what the moments of all columns need."""
    table = chosen.table
    asked: dict[str, ir.Value] = {"rows": table.count()}
    for column in chosen.columns:
        columns = moment_columns if column.kind == "number" else category_columns
        asked |= columns(table, column)
    # As text: pandas, through which Ibis reads Spark's rows, has no boolean with NULL.
    side = table.kept.isnull().ifelse("", table.kept.ifelse("kept", "missing"))
    sides = {"kept": True, "missing": False}
    found = table.group_by(side=side).agg(**asked).to_pyarrow().to_pylist()
    return {sides.get(row["side"]): row for row in found}


def _numbers(
    chosen: Narrow, rows: dict[bool | None, dict[str, Any]], rows_per_bucket: int
) -> tuple[list[NumberBias], list[CategoryBias], list[LeftOut]]:
    table, columns = chosen.table, chosen.of_kind("number")
    sides = {column: (moments(rows[True], column), moments(rows[False], column)) for column in columns}
    edges = bucket_edges(
        table, [(column, kept.n + missing.n) for column, (kept, missing) in sides.items()], rows_per_bucket
    )
    found, presence, left_out = [], [], []
    for column, (kept, missing) in sides.items():
        given = compare_presence(column, kept, missing)
        if isinstance(given, CategoryBias):
            presence.append(given)
        if not kept.n or not missing.n:
            reason = "has numbers on one side only" if kept.n or missing.n else "has no number"
            left_out.append(LeftOut(column.name, reason))
        elif min(kept.minimum, missing.minimum) == max(kept.maximum, missing.maximum):
            left_out.append(LeftOut(column.name, f"every number is {kept.minimum:g}"))
        else:
            found.append(compare_numbers(table, column, kept, missing, edges[column.alias]))
    return found, presence, left_out


def _categories(chosen: Narrow, rows: dict[bool | None, dict[str, Any]]) -> tuple[list[CategoryBias], list[LeftOut]]:
    found, left_out = [], []
    for column in chosen.of_kind("category"):
        result = compare_categories(chosen.table, column, rows[True], rows[False])
        if isinstance(result, CategoryBias):
            found.append(result)
        else:
            left_out.append(LeftOut(column.name, result))
    return found, left_out


def _corrected(bias: Bias) -> Bias:
    """The same with q over all its tests."""
    q = iter(benjamini_hochberg([test.p for test in bias.tests]))
    numbers = tuple(replace(test, q=next(q)) for test in bias.numbers)
    return replace(bias, numbers=numbers, categories=tuple(replace(test, q=next(q)) for test in bias.categories))


def _negligible(found: Test) -> bool:
    return found.size == "negligible" and (isinstance(found, CategoryBias) or found.shape == "negligible")
