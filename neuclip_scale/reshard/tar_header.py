"""Headers of the members we write, and the members in the bytes of one sample we read."""

from __future__ import annotations

import tarfile
import zlib

import numpy as np

from neuclip_scale.data.shards.names import is_unsafe, split_name
from neuclip_scale.reshard.errors import ReshardError

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
PADDING = [bytes(-size % BLOCK) for size in range(BLOCK)]
"""By size modulo 512: the zeros that fill a member's last block."""

NAME_BYTES = 100
_OWNER = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_REST = (b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2).ljust(BLOCK - 156, b"\0")
_FIXED_SUM = sum(_OWNER + _MTIME + _REST) + 8 * 0x20
_LARGEST = 8 << 30
_VARIABLE = (slice(0, NAME_BYTES), slice(124, 135))
_TEMPLATE = np.frombuffer(bytes(NAME_BYTES) + _OWNER + bytes(12) + _MTIME + bytes(8) + _REST, dtype=np.uint8)


Span = tuple[int, int]
"""Where a member's bytes begin in its sample's, and how many there are."""


def member_header(name: str, size: int) -> bytes:
    """512 bytes of a ustar header: mode 644, root, 1970. Raises `ReshardError` for what ustar cannot hold."""
    raw = name.encode(tarfile.ENCODING, "surrogateescape")
    if len(raw) > NAME_BYTES or size >= _LARGEST:
        raise ReshardError(f"member {name!r} of {size} bytes: a name over 100 bytes or 8 GiB do not fit a tar header.")
    length = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(raw) + sum(length))
    return b"".join((raw.ljust(NAME_BYTES, b"\0"), _OWNER, length, _MTIME, checksum, _REST))


def member_headers(keys: np.ndarray, extensions: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    """[m, 512] uint8: `member_header` of KEY.EXTENSION, both [m] bytes, and size [m] int64; None if a name is too long.

    Raises ValueError for keys that are not equally long.
    """
    shifts = 3 * np.arange(10, -1, -1)
    after = keys.dtype.itemsize + 1
    width = int(np.char.str_len(extensions).max())
    if after + width > NAME_BYTES:
        return None
    letters = keys.view(np.uint8).reshape(len(keys), -1)
    if not letters.all():
        raise ValueError("keys are not equally long")
    headers = np.broadcast_to(_TEMPLATE, (len(keys), BLOCK)).copy()
    headers[:, : after - 1] = letters
    headers[:, after - 1] = ord(".")
    headers[:, after : after + width] = extensions.astype(f"S{width}").view(np.uint8).reshape(len(keys), -1)
    headers[:, 124:135] = (sizes[:, None] >> shifts & 7) + 0x30
    totals = _FIXED_SUM + sum(headers[:, part].sum(axis=1, dtype=np.int64) for part in _VARIABLE)
    headers[:, 148:154] = (totals[:, None] >> shifts[-6:] & 7) + 0x30
    headers[:, 155] = 0x20
    return headers


def members_of(extent: bytes) -> dict[str, Span]:
    """Where the members, by extension, stand in the bytes of one sample of a plain tar, by their headers.

    Raises ValueError when these are not the bytes of a sample: a header is damaged or a member is cut off.
    """
    found: dict[str, Span] = {}
    at, end = 0, len(extent)
    while at < end:
        start = at + BLOCK
        header = extent[at:start]
        size, told = int(header[124:135], 8), header[148:156]
        # Adler's low half is one more than the sum of all bytes, modulo 65521: the checksum, without a loop.
        total = (zlib.adler32(header) & 0xFFFF) + 255 - sum(told)
        if total != int(told.rstrip(b" \0"), 8) and not _has_its_checksum(header):
            raise ValueError("a header does not have its checksum")
        at = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if size < 0 or at > end:
            raise ValueError("a member is cut off")
        if header[156] == 0x78:  # a pax header with times
            continue
        name = header[:NAME_BYTES].rstrip(b"\0").decode(tarfile.ENCODING, "surrogateescape")
        parts = split_name(name)
        if parts is not None and not ("/" in name and is_unsafe(name)):
            found.setdefault(parts[1], (start, size))
    return found


def _has_its_checksum(header: bytes) -> bool:
    """The same comparison by the definition; Adler's sum wraps where bytes are large."""
    return sum(header[:148]) + sum(header[156:]) + 8 * 0x20 == int(header[148:156].rstrip(b" \0"), 8)
