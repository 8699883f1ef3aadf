"""The parquet file beside a shard: keys, uids, and the columns of a predicate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.predicate import Predicate


@dataclass(frozen=True)
class Sidecar:
    """Rows of a parquet, brought into the order of a shard's samples."""

    uids: list[str | None]
    """Of each sample; empty when there are none to be trusted."""
    wanted: list[bool] | None = None
    """Whether the predicate holds, for each sample; None without a predicate."""
    fault: str = ""
    """Why it is not trusted for uids; empty when it is, or when there is none."""


def read_sidecar(shard: Path, keys: Sequence[str], predicate: Predicate | None) -> Sidecar:
    """Read SHARD.parquet; without one nothing is known, and a predicate is an error.

    A row belongs to the sample of its `key`. Rows without a sample are downloads that failed. Raises
    `ReshardError` for a predicate that cannot be evaluated.
    """
    path = shard.with_suffix(".parquet")
    if not path.exists():
        if predicate is not None:
            raise ReshardError(f"--where needs the columns of {path}, which is not there. Put it beside its shard.")
        return Sidecar([])
    try:
        rows, uids, holds = _read(path, predicate)
    except OSError as error:
        if predicate is not None:
            raise ReshardError(f"--where: {path} cannot be read ({error}). Copy it again.") from error
        return Sidecar([], None, f"{path.name} cannot be read ({error})")
    order = None if rows is None else _order(rows, keys)
    if order is None or rows is None:
        fault = f"{path.name} has no column key" if rows is None else f"{path.name} does not name every key once"
        if predicate is not None:
            raise ReshardError(f"--where: {fault} of {shard.name}. Make the parquet fit its tar.")
        return Sidecar([], None, fault)
    wanted = None if holds is None else [bool(holds[row]) for row in order]
    if uids is None:
        return Sidecar([], wanted)
    return Sidecar([uids[row] for row in order], wanted)


def _read(
    path: Path, predicate: Predicate | None
) -> tuple[list[str | None] | None, list[str | None] | None, list[bool] | None]:
    """Columns key, uid and the predicate's value; None for each that is not there. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            columns = [name for name in ("key", "uid") if name in names]
            absent = [name for name in (predicate.columns if predicate else ()) if name not in names]
            if absent:
                raise ReshardError(f"--where: {path} has no column {absent[0]}. It has {', '.join(names)}.")
            more = [name for name in (predicate.columns if predicate else ()) if name not in columns]
            table = parquet.read(columns=[*columns, *more], use_threads=False)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error
    try:
        keys, uids = (
            [None if text is None else str(text) for text in table[name].to_pylist()] if name in columns else None
            for name in ("key", "uid")
        )
    except UnicodeDecodeError as error:
        raise OSError(f"a key or uid that is no UTF-8: {error}") from error
    return keys, uids, None if predicate is None else _evaluate(table, predicate, path)


def _evaluate(table: object, predicate: Predicate, path: Path) -> list[bool]:
    import pyarrow as pa
    import pyarrow.dataset as ds

    try:
        scanner = ds.dataset(table).scanner(columns={"holds": predicate.expression()}, use_threads=False)
        column = scanner.to_table()["holds"]
    except (pa.ArrowException, TypeError) as error:
        raise ReshardError(f"--where {predicate.text!r}: {error} (columns of {path}).") from error
    if not pa.types.is_boolean(column.type):
        raise ReshardError(f"--where {predicate.text!r}: is a {column.type}, not true or false. Compare it.")
    return [value is True for value in column.to_pylist()]


def _order(rows: Sequence[str | None], keys: Sequence[str]) -> Sequence[int] | None:
    """Row of each key; None unless every key has exactly one."""
    if len(rows) == len(keys) and rows == list(keys):
        return range(len(rows)) if len(set(rows)) == len(rows) else None
    numbers: dict[str, int] = {}
    wanted = set(keys)
    for number, key in enumerate(rows):
        if key is not None and key in wanted and numbers.setdefault(key, number) != number:
            return None
    return [numbers[key] for key in keys] if len(numbers) == len(wanted) == len(keys) else None
