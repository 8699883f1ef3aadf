"""Pool against request: which sample is taken, which is a duplicate, which uid is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from neuclip_scale.reshard.columns import Column
from neuclip_scale.reshard.request import Request
from neuclip_scale.reshard.scanning import CorruptItem, ScannedShard
from neuclip_scale.reshard.uids import Uids


@dataclass(frozen=True)
class Rows:
    """Samples of the pool: shard number, and the fields of `scanning.Extents`."""

    shard: np.ndarray  # [n] uint32
    first: np.ndarray  # [n] uint32
    length: np.ndarray  # [n] uint32
    written: np.ndarray  # [n] uint32

    def __len__(self) -> int:
        return len(self.shard)

    def at(self, where: np.ndarray | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.shard[where], self.first[where], self.length[where], self.written[where])


@dataclass
class Counts:
    """Samples by what became of them."""

    read: int = 0
    selected: int = 0
    duplicated: int = 0
    not_selected: int = 0
    corrupt: int = 0
    """Found corrupt while the pool was read."""
    requested: int = 0
    requested_uids: int = 0
    """The same, each uid once."""
    found: int = 0
    """Of the requested, with repeats: what is to be written."""
    found_uids: int = 0
    missing: int = 0
    missing_uids: int = 0

    def check(self) -> None:
        """Raises AssertionError when they do not add up."""
        assert self.read == self.selected + self.duplicated + self.not_selected + self.corrupt, self
        assert self.requested == self.found + self.missing, self
        assert self.requested_uids == self.found_uids + self.missing_uids, self
        assert self.selected == self.found_uids, self


@dataclass
class Match:
    """What came of it."""

    rows: Rows
    """Taken samples in order of shard and position; one that is wanted k times stands k times."""
    counts: Counts
    shards: list[str]
    """Names by shard number."""
    num_bytes: int
    """Of all shards' samples, as far as they were read."""
    duplicates: np.ndarray
    """[d, 2] uint32: shard number and first block of samples whose uid had been taken."""
    missing: Uids
    corrupt: list[CorruptItem] = field(default_factory=list)
    sidecar_faults: dict[str, str] = field(default_factory=dict)


def match_pool(request: Request | None, scanned: Iterable[ScannedShard]) -> Match:
    """Take the first sample of every requested uid; with no request, of every uid that the predicate holds for.

    `scanned` comes in the order of the shards' paths, and each is let go before the next is asked for: memory holds
    the request, 16 bytes a uid, and what is taken, 16 bytes a sample.
    """
    taking = _Requested(request) if request is not None else _Everything()
    match = Match(_no_rows(), Counts(), [], 0, np.empty((0, 2), dtype=np.uint32), _no_uids())
    for number, shard in enumerate(scanned):
        match.shards.append(shard.name)
        match.corrupt.extend(shard.corrupt)
        match.counts.corrupt += shard.num_corrupt_samples
        match.counts.read += shard.num_corrupt_samples + len(shard.uids.high)
        match.num_bytes += int(shard.extents.length.sum(dtype=np.int64)) * 512
        if shard.sidecar_fault:
            match.sidecar_faults[shard.name] = shard.sidecar_fault
        taking.add(number, shard)
    taking.finish(match)
    match.counts.check()
    return match


class _Taken:
    """Columns of what is taken, and of duplicates."""

    def __init__(self) -> None:
        self.columns = [Column(np.uint32) for _ in range(4)]
        self.duplicates: list[np.ndarray] = []

    def append(self, number: int, shard: ScannedShard, rows: np.ndarray) -> None:
        extents = shard.extents
        parts = (np.full(len(rows), number), extents.first[rows], extents.length[rows], extents.written[rows])
        for column, part in zip(self.columns, parts, strict=True):
            column.append(part)

    def add_duplicates(self, number: np.ndarray | int, first: np.ndarray) -> None:
        if len(first):
            numbers = np.broadcast_to(np.asarray(number, dtype=np.uint32), first.shape)
            self.duplicates.append(np.stack([numbers, first], axis=1).astype(np.uint32))

    def rows(self) -> Rows:
        return Rows(*(column.take() for column in self.columns))

    def all_duplicates(self) -> np.ndarray:
        return np.concatenate(self.duplicates) if self.duplicates else np.empty((0, 2), dtype=np.uint32)


class _Requested:
    """Takes what a request names."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_taken = np.zeros(len(request.uids.high), dtype=bool)
        self.taken = _Taken()
        self.repeats = Column(np.uint32)
        self.num_unwanted = 0

    def add(self, number: int, shard: ScannedShard) -> None:
        wanted = self.request.find(shard.uids)
        asked = np.flatnonzero(wanted >= 0)
        # Of a uid that stands twice in this shard, the first; then only what no earlier shard had.
        _, earliest = np.unique(wanted[asked], return_index=True)
        first = asked[np.sort(earliest)]
        new = first[~self.is_taken[wanted[first]]]
        self.is_taken[wanted[new]] = True
        self.taken.append(number, shard, new)
        self.taken.add_duplicates(number, shard.extents.first[np.setdiff1d(asked, new, assume_unique=True)])
        self.num_unwanted += len(wanted) - len(asked)
        if self.request.counts is not None:
            self.repeats.append(self.request.counts[wanted[new]])

    def finish(self, match: Match) -> None:
        counts, request, times = match.counts, self.request, self.request.counts
        counts.not_selected = self.num_unwanted
        match.duplicates = self.taken.all_duplicates()
        counts.duplicated = len(match.duplicates)
        counts.requested, counts.requested_uids = request.num_requested, len(self.is_taken)
        absent = np.flatnonzero(~self.is_taken)
        counts.missing_uids = len(absent)
        counts.missing = len(absent) if times is None else int(times[absent].sum(dtype=np.int64))
        match.missing = Uids(request.uids.high[absent], request.uids.low[absent])
        rows = self.taken.rows()
        counts.selected = counts.found_uids = len(rows)
        match.rows = rows if times is None else _repeated(rows, self.repeats.take())
        counts.found = len(match.rows)


class _Everything:
    """Takes every uid that the predicate, if any, holds for."""

    def __init__(self) -> None:
        self.taken = _Taken()
        self.high, self.low = Column(np.uint64), Column(np.uint64)
        self.num_unwanted = 0

    def add(self, number: int, shard: ScannedShard) -> None:
        rows = np.arange(len(shard.uids.high)) if shard.wanted is None else np.flatnonzero(shard.wanted)
        self.num_unwanted += len(shard.uids.high) - len(rows)
        self.taken.append(number, shard, rows)
        self.high.append(shard.uids.high[rows])
        self.low.append(shard.uids.low[rows])

    def finish(self, match: Match) -> None:
        rows = self.taken.rows()
        again = _seen_before(self.high.take(), self.low.take())
        if len(again):
            self.taken.add_duplicates(rows.shard[again], rows.first[again])
            kept = np.ones(len(rows), dtype=bool)
            kept[again] = False
            rows = rows.at(kept)
        counts = match.counts
        counts.not_selected, counts.duplicated = self.num_unwanted, len(again)
        counts.selected = counts.requested = counts.requested_uids = counts.found = counts.found_uids = len(rows)
        match.duplicates, match.rows = self.taken.all_duplicates(), rows


def _seen_before(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Rows whose number stands in an earlier row, ascending."""
    ordered = np.sort(high)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(twice):
        return np.empty(0, dtype=np.int64)
    place = np.minimum(np.searchsorted(twice, high), len(twice) - 1)
    rows = np.flatnonzero(twice[place] == high)
    _, first = np.unique(np.stack([high[rows], low[rows]], axis=1), axis=0, return_index=True)
    return np.delete(rows, first)


def _repeated(rows: Rows, times: np.ndarray) -> Rows:
    return Rows(*(np.repeat(part, times) for part in (rows.shard, rows.first, rows.length, rows.written)))


def _no_rows() -> Rows:
    return Rows(*(np.empty(0, dtype=np.uint32) for _ in range(4)))


def _no_uids() -> Uids:
    return Uids(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64))
