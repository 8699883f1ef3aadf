"""Bytes of an output shard on their way to the disk."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

from neuclip_scale.reshard.patching import WrittenMember
from neuclip_scale.reshard.sources import Part
from neuclip_scale.reshard.tar_header import BLOCK, END_OF_ARCHIVE, PADDING, member_header

_WRITE_BYTES = 1 << 20
_WRITE_PARTS = 900  # below IOV_MAX, 1024


class Writer:
    """Writes samples at the places they are given; pieces that follow each other are collected."""

    def __init__(self, descriptor: int) -> None:
        self.end = 0
        """Where the sample that `add_sample` took last ends."""
        self._descriptor = descriptor
        self._parts: list[bytes | memoryview] = []
        self._start = 0

    def add_sample(self, offset: int, key: str, members: list[Part]) -> list[WrittenMember]:
        """Write a sample at `offset` as headers and members."""
        if (
            offset != self.end
            or self.end - self._start > _WRITE_BYTES
            or len(self._parts) > _WRITE_PARTS - 3 * len(members)
        ):
            self._flush()
            self._start = self.end = offset
        written = []
        for extension, data in members:
            size = len(data)
            header = member_header(f"{key}.{extension}", size)
            self._parts += (header, data, PADDING[size % BLOCK])
            self.end += BLOCK + size + -size % BLOCK
            written.append(WrittenMember(extension, size, zlib.crc32(data), zlib.crc32(header)))
        return written

    def write_extents(self, content: bytearray, lengths: Sequence[int], offsets: Sequence[int]) -> None:
        """Write parts of `content`, `lengths` bytes each and back to back, at `offsets`."""
        view, begin, done = memoryview(content), 0, 0
        for number, length in enumerate(lengths):
            done += length
            is_last = number + 1 == len(lengths)
            if is_last or offsets[number + 1] != offsets[number] + length:
                _write(self._descriptor, view[begin:done], offsets[number] + length - (done - begin))
                begin = done

    def finish(self, offset: int) -> None:
        """End the archive at `offset`."""
        self._flush()
        _write(self._descriptor, memoryview(END_OF_ARCHIVE), offset)

    def _flush(self) -> None:
        """Hand everything collected to the kernel."""
        at, parts = self._start, self._parts
        for begin in range(0, len(parts), _WRITE_PARTS):
            group = parts[begin : begin + _WRITE_PARTS]
            size, done = sum(map(len, group)), os.pwritev(self._descriptor, group, at)
            if done < size:
                _write(self._descriptor, memoryview(b"".join(group))[done:], at + done)
            at += size
        self._parts = []


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    """All of it: a full disk takes a part, and the next call says why."""
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
