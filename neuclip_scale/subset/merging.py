"""Sorted lists of uids joined into one .npy of `u8,u8`, in the memory of one bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from neuclip_scale.files import atomic_file
from neuclip_scale.reshard.request import SUBSET_DTYPE

_ROW_BYTES = 16
_SAMPLED = 1024
"""Every so many uids of a list one is looked at, to find buckets of equal size."""
_LEAST_ROWS_OF_A_BUCKET = 1 << 20
_MOST_BUCKETS = 512
"""Each list is opened once a bucket: thousands of lists in thousands of buckets would be a night of opening files."""


@dataclass(frozen=True)
class Merged:
    """What was written."""

    num_uids: int
    num_repeated: int
    """Rows whose uid another kept row has too."""
    digest: str
    """Of the uids."""


def sorted_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[n, 2] uint64, high and low halves of the uids in `parts`, sorted."""
    pairs = np.concatenate([np.empty((0, 2), dtype=np.uint64), *parts])
    return np.ascontiguousarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])


def rows_of_buckets(num_rows: int) -> int:
    """Rows of one bucket for so many in all. Joining takes 70 bytes a row of the bucket: 1.8 GB for 12.8 billion."""
    return max(_LEAST_ROWS_OF_A_BUCKET, -(-num_rows // _MOST_BUCKETS))


def merge(parts: Sequence[Path], target: Path, rows_of_a_bucket: int | None = None) -> Merged:
    """Write the uids of all `parts` (see `sorted_rows`) to `target`, each once; the bytes are those of `numpy.save`.

    Uids are hashes, so buckets by their first half are even; one that many share would make a large bucket.
    """
    if rows_of_a_bucket is None:
        rows_of_a_bucket = rows_of_buckets(sum(path.stat().st_size for path in parts) // _ROW_BYTES)
    bounds = _bounds(parts, rows_of_a_bucket)
    digest = hashlib.blake2b(digest_size=16)
    num_rows = num_uids = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as stream:
        _write_header(stream, 0)
        for bucket in range(bounds.shape[1] - 1):
            pairs = sorted_rows(
                [_rows(path, *bounds[part, bucket : bucket + 2].tolist()) for part, path in enumerate(parts)]
            )
            num_rows += len(pairs)
            is_new = np.ones(len(pairs), dtype=bool)
            is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
            pairs = pairs[is_new].astype("<u8", copy=False)
            num_uids += len(pairs)
            digest.update(pairs.data)
            stream.write(pairs.data)
        stream.seek(0)
        _write_header(stream, num_uids)
    return Merged(num_uids, num_rows - num_uids, digest.hexdigest())


def digest_of(path: Path) -> str | None:
    """The digest of a list that `merge` wrote; None for anything else."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                return None
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if len(shape) != 1 or dtype != SUBSET_DTYPE:
                return None
            count = 0
            while block := stream.read(1 << 22):
                digest.update(block)
                count += len(block)
    except (OSError, ValueError):
        return None
    return digest.hexdigest() if count == shape[0] * _ROW_BYTES else None


def _write_header(stream: IO[bytes], num_rows: int) -> None:
    """As long for any number of rows: numpy leaves room for the axis to grow."""
    header = {"descr": np.lib.format.dtype_to_descr(SUBSET_DTYPE), "fortran_order": False, "shape": (num_rows,)}
    np.lib.format.write_array_header_1_0(stream, header)


def _bounds(parts: Sequence[Path], rows_of_a_bucket: int) -> np.ndarray:
    """[parts, buckets + 1], the row of each part at which each bucket begins; a uid is in one bucket only."""
    sizes = [path.stat().st_size // _ROW_BYTES for path in parts]
    step = max(1, min(_SAMPLED, rows_of_a_bucket // 4))
    samples = [_high_halves(path, size)[::step].copy() for path, size in zip(parts, sizes, strict=True)]
    sample = np.sort(np.concatenate([np.empty(0, dtype=np.uint64), *samples]))
    splits = np.unique(sample[:: max(1, rows_of_a_bucket // step)])[1:]
    bounds = np.zeros((len(parts), len(splits) + 2), dtype=np.int64)
    for part, (path, size) in enumerate(zip(parts, sizes, strict=True)):
        bounds[part, 1:-1] = np.searchsorted(_high_halves(path, size), splits)
        bounds[part, -1] = size
    return bounds


def _high_halves(path: Path, size: int) -> np.ndarray:
    """[size] uint64, of which only what is looked at is read."""
    return np.memmap(path, np.uint64, "r", shape=(size, 2))[:, 0] if size else np.empty(0, dtype=np.uint64)


def _rows(path: Path, begin: int, end: int) -> np.ndarray:
    """[end - begin, 2] uint64."""
    count = 2 * (end - begin)
    return np.fromfile(path, dtype=np.uint64, count=count, offset=begin * _ROW_BYTES).reshape(-1, 2)
