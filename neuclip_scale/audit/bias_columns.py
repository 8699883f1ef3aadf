"""Which columns of a list are compared between what was downloaded and what was not, and as what."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from neuclip_scale.audit import addresses

if TYPE_CHECKING:
    import ibis.expr.types as ir

BEYOND = 1e100
"""Numbers of a larger size are counted beside the infinite ones: their squares leave float64 no room for a sum."""

NAMES_OF_ITS_OWN = ("uid", "url", "text", "caption", "sha256", "md5", "key")
"""Columns that name a sample or are looked at through what is derived from them."""

# RE2 and Java agree on this class, not on \s.
_SPACES = r"[\t\n\x0B\f\r ]+"


@dataclass(frozen=True)
class Column:
    """A column that is compared; `alias` names it in `Narrow.table`."""

    name: str
    alias: str
    kind: Literal["number", "category"]
    whole: bool = False
    """Whether its numbers are whole ones."""
    derived: bool = False
    """Whether it was made from another column."""


@dataclass(frozen=True)
class LeftOut:
    """A column that is not compared."""

    column: str
    reason: str


@dataclass(frozen=True)
class Narrow:
    """The list as the comparison needs it: `kept`, and one column each under names without surprises.

    A number's column is float64, with `{alias}_given` NULL where it is NULL, NaN, infinite or beyond 1e100; that of a
    category is a string, with `{alias}_given` saying whether it is there.
    """

    table: ir.Table
    columns: tuple[Column, ...]
    left_out: tuple[LeftOut, ...]

    def of_kind(self, kind: Literal["number", "category"]) -> list[Column]:
        """Its columns of one kind, in the order of the list."""
        return [column for column in self.columns if column.kind == kind]


def narrow(table: ir.Table, kept: str, leave_out: Collection[str] = ()) -> Narrow:
    """Choose and derive columns of `table`; raises ValueError unless it has a boolean column `kept`."""
    schema = table.schema()
    if kept not in schema or not schema[kept].is_boolean():
        raise ValueError(f"kept = {kept!r}: no boolean column of the table; it has {', '.join(schema)}")
    values: dict[str, ir.Value] = {"kept": table[kept]}
    columns: list[Column] = []
    left_out: list[LeftOut] = []
    derived = _derived(table)
    for name in [*schema, *derived]:
        if name == kept:
            continue
        value = derived[name][1] if name in derived else table[name]
        reason = "left out as asked" if name in leave_out else _reason(name, value)
        if reason:
            left_out.append(LeftOut(name, reason))
            continue
        column = _column(name, value, len(columns), name in derived)
        columns.append(column)
        values |= _values(column, value, derived[name][0] if name in derived else value)
    return Narrow(table.select(**values), tuple(columns), tuple(left_out))


def num_words(text: ir.StringValue) -> ir.IntegerValue:
    """Runs of other characters than ASCII white space."""
    words = text.re_replace(_SPACES, " ").strip()
    return (words.length() == 0).ifelse(0, words.length() - words.replace(" ", "").length() + 1)


def _derived(table: ir.Table) -> dict[str, tuple[ir.Value, ir.Value]]:
    """Name -> the column it is made from, which is NULL where it is, and itself."""
    schema = table.schema()
    found: dict[str, tuple[ir.Value, ir.Value]] = {}
    texts = [name for name in ("text", "caption") if name in schema and schema[name].is_string()]
    for text in (table[name] for name in texts[:1]):
        found[f"{text.get_name()} length in characters"] = text, text.length()
        found[f"{text.get_name()} length in words"] = text, num_words(text)
    if "url" in schema and schema["url"].is_string():
        found["top-level domain"] = table["url"], addresses.top_level_domain(table["url"])
    return {name: pair for name, pair in found.items() if name not in schema}


def _reason(name: str, value: ir.Value) -> str:
    """Why a column is left out by its name or type; empty when it is not."""
    if name.lower() in NAMES_OF_ITS_OWN:
        return "names a sample; its length and domain are compared instead where they can be"
    kind = value.type()
    if kind.is_numeric() or kind.is_boolean() or kind.is_string():
        return ""
    return f"of type {kind}: neither numbers nor categories"


def _column(name: str, value: ir.Value, number: int, derived: bool) -> Column:
    kind = value.type()
    # Ibis counts booleans among the numbers.
    if kind.is_numeric() and not kind.is_boolean():
        return Column(name, f"c{number}", "number", kind.is_integer(), derived)
    return Column(name, f"c{number}", "category", derived=derived)


def _values(column: Column, value: ir.Value, source: ir.Value) -> dict[str, ir.Value]:
    given = f"{column.alias}_given"
    if column.kind == "category":
        return {column.alias: value.cast("string"), given: source.notnull()}
    number = value.cast("float64")
    # NaN is larger than every number, in DuckDB as in Spark.
    return {column.alias: number, given: (number.abs() <= BEYOND).ifelse(number, None)}
