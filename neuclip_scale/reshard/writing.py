"""Bytes of an output shard on their way to the disk, read again as soon as the kernel has them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import numpy as np

from neuclip_scale.reshard.buffers import Buffer
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.sources import Part
from neuclip_scale.reshard.tar_header import BLOCK, END_OF_ARCHIVE, PADDING, member_header

_WRITE_BYTES = 1 << 20


class Writer:
    """Writes samples at the places they are given; pieces that follow each other are collected.

    Every byte is read back and compared. Methods raise `ReshardError` for a difference, OSError for a full disk.
    """

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is open for reading and writing."""
        self.end = 0
        """Where the sample that `add_sample` took last ends."""
        self._descriptor = descriptor
        self._parts: list[bytes | memoryview] = []
        self._start = 0
        self._buffer = Buffer()

    def add_sample(self, offset: int, key: str, members: list[Part]) -> list[int]:
        """Write a sample at `offset` as headers and members; returns the CRC-32 of each member's bytes."""
        if offset != self.end or self.end - self._start > _WRITE_BYTES:
            self._flush()
            self._start = self.end = offset
        crcs = []
        for extension, data in members:
            size = len(data)
            header = member_header(f"{key}.{extension}", size)
            self._parts += (header, data, PADDING[size % BLOCK])
            self.end += BLOCK + size + -size % BLOCK
            crcs.append(zlib.crc32(data))
        return crcs

    def write_extents(self, content: np.ndarray, lengths: Sequence[int], offsets: Sequence[int]) -> None:
        """Write parts of `content` [bytes] uint8, `lengths` bytes each and back to back, at `offsets`."""
        view, begin, done = content.data, 0, 0
        for number, length in enumerate(lengths):
            done += length
            is_last = number + 1 == len(lengths)
            if is_last or offsets[number + 1] != offsets[number] + length:
                self._write(view[begin:done], offsets[number] + length - (done - begin))
                begin = done

    def finish(self, offset: int) -> None:
        """End the archive at `offset`."""
        self._flush()
        self._write(memoryview(END_OF_ARCHIVE), offset)

    def _flush(self) -> None:
        """Hand everything collected to the kernel."""
        if self._parts:
            self._write(memoryview(b"".join(self._parts)), self._start)
        self._parts = []

    def _write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`, whole blocks: a full disk takes a part, and the next call says why. Then compare."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)
        read = self._buffer.take(len(data)).data
        if os.preadv(self._descriptor, [read], offset) < len(data) or not _equal(read, data):
            raise ReshardError(
                f"bytes {offset} to {offset + len(data)} read back otherwise than written. Check the disk."
            )


def _equal(one: memoryview, other: memoryview) -> bool:
    """Whether two runs of whole blocks are equal; numpy looks at eight bytes at a time, memoryview at one."""
    return np.array_equal(np.frombuffer(one, np.uint64), np.frombuffer(other, np.uint64))
