"""Who copies what where: the order of the taken samples, and their cut into output shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.matching import Rows

BLOCK = 512
END_BLOCKS = 2
"""Blocks of zeros that end a tar."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Cut:
    """How large an output shard is; exactly one of the two is given."""

    samples: int = 0
    """At most; shards differ by one."""
    num_bytes: int = 0
    """Of the file at most, but for a single sample that is larger."""


@dataclass(frozen=True)
class Plan:
    """Rows in the order they are written; output shard `k` holds `starts[k]:starts[k + 1]`."""

    rows: Rows
    starts: np.ndarray  # [outputs + 1] int64

    @property
    def num_outputs(self) -> int:
        return len(self.starts) - 1

    def output(self, number: int) -> Rows:
        """Rows of one output shard."""
        return self.rows.at(slice(int(self.starts[number]), int(self.starts[number + 1])))

    @property
    def num_bytes(self) -> int:
        """Of all outputs, before any picture is encoded anew."""
        return (int(self.rows.written.sum(dtype=np.int64)) + END_BLOCKS * self.num_outputs) * BLOCK

    @property
    def key_digits(self) -> int:
        """Digits of a sample's number in its shard; four in DataComp's keys."""
        largest = int(np.diff(self.starts).max(initial=1))
        return max(4, len(str(largest - 1)))


def make_plan(rows: Rows, cut: Cut, shuffle_seed: int | None) -> Plan:
    """Order `rows`, in place, and cut them. Depends on nothing but its arguments.

    Without a seed they stay in order; with one, all are permuted by a hash of seed and place, the same everywhere and
    with any version of numpy. Raises `ReshardError` for a cut that is not positive.
    """
    if (cut.samples > 0) == (cut.num_bytes > 0):
        raise ReshardError(
            f"--shard-size {cut.samples}, --shard-bytes {cut.num_bytes}: give one of them, and positive."
        )
    if shuffle_seed is not None and len(rows):
        order = _shuffled(len(rows), shuffle_seed)
        for part in (rows.shard, rows.first, rows.length, rows.written):
            part[:] = part[order]
    starts = (
        _starts_by_samples(len(rows), cut.samples) if cut.samples else _starts_by_bytes(rows.written, cut.num_bytes)
    )
    return Plan(rows, starts)


def _shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1 (splitmix64 of the place, sorted)."""
    mixed = np.arange(count, dtype=np.uint64)
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (1 << 64) - 1)
    with np.errstate(over="ignore"):
        for begin in range(0, count, _CHUNK):
            z = (mixed[begin : begin + _CHUNK] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + start
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed[begin : begin + _CHUNK] = z ^ (z >> np.uint64(31))
    # The mixing is one to one, so no two are equal and any sort gives the same order.
    return np.argsort(mixed)


def _starts_by_samples(count: int, most: int) -> np.ndarray:
    outputs = -(-count // most)
    return np.arange(outputs + 1, dtype=np.int64) * count // max(outputs, 1)


def _starts_by_bytes(written: np.ndarray, num_bytes: int) -> np.ndarray:
    """As few shards as keep to `num_bytes`, and then as even as they can be."""
    ends = np.cumsum(written, dtype=np.int64)
    most = max(num_bytes // BLOCK - END_BLOCKS, 1)
    starts = _greedy(ends, most)
    low, high = int(ends[-1]) // max(len(starts) - 1, 1) if len(ends) else 0, most
    while low < high:
        middle = (low + high) // 2
        tried = _greedy(ends, middle)
        if len(tried) <= len(starts):
            starts, high = tried, middle
        else:
            low = middle + 1
    return starts


def _greedy(ends: np.ndarray, most: int) -> np.ndarray:
    """Starts of shards of at most `most` blocks each, or of one sample."""
    starts = [0]
    while starts[-1] < len(ends):
        before = int(ends[starts[-1] - 1]) if starts[-1] else 0
        after = int(np.searchsorted(ends, before + most, side="right"))
        starts.append(max(after, starts[-1] + 1))
    return np.array(starts, dtype=np.int64)
