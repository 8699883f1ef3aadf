"""Two downloads of one list against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neuclip_scale.queries.engines import Engine


@dataclass(frozen=True)
class Pair:
    """How far two downloads hold the same samples."""

    first: str
    second: str
    common: int
    only_first: int
    only_second: int
    jaccard: float
    """Common over all of either; 1 for two empty ones."""
    unequal_share: float
    """Samples of the larger one that the smaller one would need or should lose: 1 - smaller / larger size."""
    samples_seen: int | None = None
    """A training run's, for the next two; None when none was given."""
    epochs_first: float | None = None
    """Passes over the first download in that run."""
    epochs_second: float | None = None
    looks: dict[str, int] | None = None
    """With `--deep`: of the common samples with other original bytes, how much that shows (see `changes`)."""


def compare_pair(engine: Engine, table: Any, names: tuple[str, str], samples_seen: int | None) -> Pair:
    """From a table with one row a uid and `first` and `second`, whether each download has it."""
    both, either = table.first & table.second, table.first | table.second
    row = engine.rows(
        table.agg(
            common=both.cast("int64").sum(),
            first=table.first.cast("int64").sum(),
            second=table.second.cast("int64").sum(),
            either=either.cast("int64").sum(),
        )
    )[0]
    common, first, second, any_of = (row[name] or 0 for name in ("common", "first", "second", "either"))
    larger = max(first, second)
    return Pair(
        *names,
        common,
        first - common,
        second - common,
        common / any_of if any_of else 1.0,
        1 - min(first, second) / larger if larger else 0.0,
        samples_seen,
        samples_seen / first if samples_seen and first else None,
        samples_seen / second if samples_seen and second else None,
    )
