"""Small pools like DataComp's, and the slow, obvious selection that ours is held to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuclip_scale.commands import subset as command
from neuclip_scale.subset import Subset, SubsetRequest, select_subset
from neuclip_scale.subset.filters import Filter

Row = dict[str, Any]
SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("clip_b32_similarity_score", pa.float64()),
        ("clip_l14_similarity_score", pa.float64()),
    ]
)


def uid_of(text: object) -> str:
    return hashlib.md5(str(text).encode()).hexdigest()


def row_of(number: int, **more: Any) -> Row:
    return {
        "uid": uid_of(number),
        "url": f"http://images.test/{number}",
        "text": f"a picture of the number {number}",
        "original_width": 400,
        "original_height": 300,
        "clip_b32_similarity_score": number / 1000,
        "clip_l14_similarity_score": -number / 1000,
        **more,
    }


def write_rows(path: Path, rows: Sequence[Row], schema: pa.Schema = SCHEMA, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, **options)
    return path


def write_pool(folder: Path, files: Iterable[Sequence[Row]], **options: Any) -> Path:
    for number, rows in enumerate(files):
        write_rows(folder / f"{number:05d}.parquet", rows, **options)
    return folder


def select(pool: Path, output: Path, *filters: Filter, **options: Any) -> Subset:
    return select_subset(SubsetRequest(str(pool), output, filters, **options))


def uids(path: Path) -> list[str]:
    found = np.load(path)
    assert found.dtype == np.dtype("u8,u8")
    return [f"{int(high):016x}{int(low):016x}" for high, low in found]


def expected(rows: Iterable[Row], passes: Callable[[Row], bool]) -> list[str]:
    return sorted({row["uid"] for row in rows if passes(row)})


def is_basic(row: Row, words: int = 3, chars: int = 6, side: int = 200, aspect: float = 3.0) -> bool:
    text, width, height = row["text"], row["original_width"], row["original_height"]
    if text is None or width is None or height is None:
        return False
    small, large = min(width, height), max(width, height)
    ratio = large / small if small else math.nan if not large else math.inf
    return len(text.split()) >= words and len(text) >= chars and small >= side and ratio <= aspect


def run(*arguments: object) -> int:
    """The command in this process."""
    return command.main([str(argument) for argument in arguments])
