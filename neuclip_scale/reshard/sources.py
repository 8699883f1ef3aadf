"""Reading samples from the input shards of a plan."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from neuclip_scale.data.shards import read_member
from neuclip_scale.reshard.buffers import Buffer
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.state import OddIndex, SavedPlan
from neuclip_scale.reshard.tar_header import BLOCK, members_of

_OPEN_FILES = 64
"""Shards open at once; far below any limit of open files."""


class Part(NamedTuple):
    """One member of a sample."""

    extension: str
    data: bytes | memoryview


class Sources:
    """The input shards of a plan, opened when they are needed; closes them at the end of the block."""

    def __init__(self, saved: SavedPlan, folder: Path) -> None:
        self._saved = saved
        self._folder = folder
        self._buffer = Buffer()
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, shard: int, first: int, length: int) -> list[Part]:
        """Members of the sample in blocks `first` to `first + length` of a shard.

        Raises `ReshardError` when the shard is no longer what was planned.
        """
        source, descriptor = self._saved.sources[shard], self._descriptor(shard)
        if not source.is_plain:
            odd = _odd_index(self._saved.folder, shard)
            return [Part(name, read_member(descriptor, span)) for name, span in odd.members(first)]
        extent = os.pread(descriptor, length * BLOCK, first * BLOCK)
        if len(extent) < length * BLOCK:
            raise self._changed(shard, f"ends inside a sample at byte {first * BLOCK}")
        view = memoryview(extent)
        try:
            return [Part(name, view[start : start + size]) for name, (start, size) in members_of(extent).items()]
        except ValueError as error:
            raise self._changed(shard, f"sample at byte {first * BLOCK}: {error}") from error

    def is_plain(self, shard: int) -> bool:
        """Whether samples of a shard can be read by their extents."""
        return self._saved.sources[shard].is_plain

    def read_extents(self, extents: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Bytes [bytes] uint8 of samples (shard, first block, blocks), back to back.

        What follows each other in a file is read in one go. The next call overwrites them. Raises `ReshardError` when a
        shard is no longer what was planned.
        """
        content = self._buffer.take(BLOCK * sum(length for *_, length in extents))
        view, done = content.data, 0
        for shard, first, length in _joined(extents):
            part = view[done : done + length * BLOCK]
            if os.preadv(self._descriptor(shard), [part], first * BLOCK) < len(part):
                raise self._changed(shard, f"ends inside a sample after byte {first * BLOCK}")
            done += len(part)
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        source = self._saved.sources[shard]
        descriptor = self._open[shard] = os.open(self._folder / source.name, os.O_RDONLY)
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (source.num_bytes, source.mtime_ns):
            raise self._changed(shard, f"{source.num_bytes} bytes then, {status.st_size} now")
        return descriptor

    def _changed(self, shard: int, how: str) -> ReshardError:
        path = self._folder / self._saved.sources[shard].name
        return ReshardError(f"shard {path}: was changed since it was planned ({how}). Begin anew in another folder.")


def _joined(extents: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Extents with those that follow each other made one."""
    shard, first, length = extents[0]
    for next_shard, next_first, next_length in extents[1:]:
        if (next_shard, next_first) == (shard, first + length):
            length += next_length
        else:
            yield shard, first, length
            shard, first, length = next_shard, next_first, next_length
    yield shard, first, length


@lru_cache(maxsize=16)
def _odd_index(folder: Path, shard: int) -> OddIndex:
    return OddIndex(folder, shard)
