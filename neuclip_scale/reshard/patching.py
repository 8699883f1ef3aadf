"""Many samples at once: their bytes as they stand in a plain tar, new headers written over the old ones."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neuclip_scale.data.shards.names import is_unsafe, split_name
from neuclip_scale.data.shards.plain import are_sound, header_names
from neuclip_scale.reshard.tar_header import BLOCK, NAME_BYTES, member_headers

_PLAIN_FILE = (0, 0x30)
"""Kinds of a header: "0", and what stood there before POSIX."""


class WrittenMember(NamedTuple):
    """A member as it should stand in the output."""

    extension: str
    size: int
    crc: int
    """CRC-32 of its bytes."""


def patch(extents: bytearray, lengths: Sequence[int], keys: Sequence[str]) -> list[list[WrittenMember]] | None:
    """Rename the samples in `extents`, in place; returns the members of each.

    `extents` holds samples back to back, `lengths` their bytes, `keys` their new keys. None, with `extents` as they
    were, unless they consist of sound headers of plain files, each a member of its sample and none there twice: such
    samples want a closer look (`tar_header.members_of`), which also says what is wrong.
    """
    found = _walk(extents, lengths)
    if found is None:
        return None
    places, sizes, counts = found
    blocks = np.frombuffer(extents, dtype=np.uint8).reshape(-1, BLOCK)
    rows = np.array(places, dtype=np.int64) // BLOCK
    old = blocks[rows]
    if not np.isin(old[:, 156], _PLAIN_FILE).all() or not are_sound(old):
        return None
    extensions = _extensions(header_names(old), counts)
    if extensions is None:
        return None
    new_keys = [key for key, count in zip(keys, counts, strict=True) for _ in range(count)]
    pairs = zip(new_keys, extensions, strict=True)
    names = [f"{key}.{extension}".encode(tarfile.ENCODING, "surrogateescape") for key, extension in pairs]
    if max(map(len, names)) > NAME_BYTES:
        return None
    headers = member_headers(names, np.array(sizes, dtype=np.int64))
    blocks[rows] = headers
    return _members(extents, extensions, places, sizes, counts)


def _walk(extents: bytearray, lengths: Sequence[int]) -> tuple[list[int], list[int], list[int]] | None:
    """Where headers stand and the sizes they tell, and how many of them each sample has; None if they do not fit."""
    places: list[int] = []
    sizes: list[int] = []
    counts: list[int] = []
    at = 0
    for length in lengths:
        end, before = at + length, len(places)
        while at < end:
            try:
                size = int(extents[at + 124 : at + 135], 8)
            except ValueError:
                return None
            if size < 0:
                return None
            places.append(at)
            sizes.append(size)
            at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        if at != end:
            return None
        counts.append(len(places) - before)
    return places, sizes, counts


def _extensions(names: list[str], counts: list[int]) -> list[str] | None:
    """Extensions of members, None where a name is not a sample's, unsafe or repeated in its sample."""
    found: list[str] = []
    for name in names:
        parts = split_name(name)
        if parts is None or ("/" in name and is_unsafe(name)):
            return None
        found.append(parts[1])
    begin = 0
    for count in counts:
        if len(set(found[begin : begin + count])) < count:
            return None
        begin += count
    return found


def _members(
    extents: bytearray, extensions: list[str], places: list[int], sizes: list[int], counts: list[int]
) -> list[list[WrittenMember]]:
    view, crc32 = memoryview(extents), zlib.crc32
    members = [
        WrittenMember(extension, size, crc32(view[at + BLOCK : at + BLOCK + size]))
        for extension, at, size in zip(extensions, places, sizes, strict=True)
    ]
    rows, begin = [], 0
    for count in counts:
        rows.append(members[begin : begin + count])
        begin += count
    return rows
