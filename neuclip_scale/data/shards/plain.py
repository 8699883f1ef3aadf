"""The members of a tar that holds nothing but plain files, found without `tarfile`.

Plain is what webdataset and img2dataset write: ustar or GNU headers of regular files with octal numbers and names of
at most 100 bytes, each perhaps after a pax header that tells times only. Of such a tar this module says exactly what
`tarfile` would say, many times faster. Of any other (links, long names, sparse files, base-256 numbers, damage) it
says nothing, and `tarfile` decides.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass, field

import numpy as np

BLOCK = tarfile.BLOCKSIZE

_WINDOW_BYTES = 8192
"""Read at once: the headers of a sample's small members, and of the next sample, come with one call."""
_HEADERS_AT_ONCE = 4096
"""Headers checked together, 2 MiB of them: what bounds the memory."""
_ZEROS = bytes(BLOCK)
_PAX_TIMES = re.compile(rb"((?:[0-9]{1,3} [amc]time=-?[0-9.]+\n)+)\0*")
# Octal numbers: mode, uid, gid, size, mtime, checksum, devmajor, devminor (bytes from, to).
_NUMBERS = ((100, 108), (108, 116), (116, 124), (124, 136), (136, 148), (148, 156), (329, 337), (337, 345))


@dataclass
class PlainFiles:
    """Regular files of a tar in file order: names, and where their bytes stand."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def plain_files(descriptor: int, num_bytes: int) -> PlainFiles | None:
    """Regular files of an open tar of `num_bytes`; None when it is not plain to its proper end.

    Reads by pread: unlike a memory map it cannot kill the process when a shard is cut while it is read. Raises
    OSError when the file cannot be read.
    """
    found = PlainFiles()
    headers, is_file = bytearray(), [True]  # those read but not yet checked; and whether a header is a file's
    window, start, offset = b"", 0, 0
    # This loop runs for every member: no calls but what it cannot do without.
    while True:
        at = offset - start
        if at + BLOCK > len(window):
            window, start, at = os.pread(descriptor, _WINDOW_BYTES, offset), offset, 0
            if len(window) < BLOCK:
                return None
        try:
            size = int(window[at + 124 : at + 135], 8)
        except ValueError:
            break
        end = offset + BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        if size < 0 or end > num_bytes:
            return None
        kind = window[at + 156]
        if kind == 0x30 or kind == 0:  # "0" and what it was before POSIX
            found.offsets.append(offset + BLOCK)
            found.sizes.append(size)
        elif kind != 0x78 or not is_file[-1] or not _tells_times_only(descriptor, offset + BLOCK, size):  # "x"
            return None
        headers += window[at : at + BLOCK]
        is_file.append(kind != 0x78)
        if len(headers) >= _HEADERS_AT_ONCE * BLOCK and is_file[-1]:
            if not _check(headers, is_file[1:], found):
                return None
            headers, is_file = bytearray(), [True]
        offset = end
    # A pax header promises a file, and an archive has one at least: the rest is for tarfile to judge.
    if window[at : at + BLOCK] != _ZEROS or not is_file[-1] or not found.offsets:
        return None
    return found if _check(headers, is_file[1:], found) else None


def _tells_times_only(descriptor: int, offset: int, size: int) -> bool:
    """Whether a pax header's records are whole and change neither name nor size of the next member."""
    padded = (size + BLOCK - 1) // BLOCK * BLOCK
    match = _PAX_TIMES.fullmatch(os.pread(descriptor, padded, offset)) if padded <= _WINDOW_BYTES else None
    if match is None or match.end(1) != size:
        return False
    records = match[1].splitlines(keepends=True)
    return all(int(record.split(b" ", 1)[0]) == len(record) for record in records)


def _check(headers: bytearray, is_file: list[bool], found: PlainFiles) -> bool:
    """Whether all `headers` are sound and plain; the names of the files among them, if so, go to `found`."""
    blocks = np.frombuffer(headers, dtype=np.uint8).reshape(-1, BLOCK)
    if not are_sound(blocks):
        return False
    names = header_names(blocks[is_file])
    found.names += names
    return not any(name.endswith("/") for name in names)  # folders in tars older than POSIX


def header_names(blocks: np.ndarray) -> list[str]:
    """Names in headers [h, 512] that `are_sound`."""
    texts = np.ascontiguousarray(blocks[:, :100]).view("S100")[:, 0].tolist()
    return [text.decode(tarfile.ENCODING, "surrogateescape") for text in texts]


def are_sound(blocks: np.ndarray) -> bool:
    """Whether all headers [h, 512] uint8 have their checksum, octal numbers and a name in its first field alone."""
    if not all(_are_numbers(blocks[:, begin:end]) for begin, end in _NUMBERS):
        return False
    stored = blocks[:, 148:156]
    told = np.zeros(len(blocks), dtype=np.int64)
    for column in stored.T:
        told = np.where(_is_digit(column), told * 8 + column - 0x30, told)
    actual = blocks.sum(axis=1, dtype=np.uint32) - stored.sum(axis=1, dtype=np.uint32) + 8 * 0x20
    name = blocks[:, :100]
    # A NUL ends a name, whatever follows; a ustar prefix would stand before it. The size is read without its last byte.
    cut = (name[:, :-1] == 0) & (name[:, 1:] != 0)
    return not ((told != actual).any() or blocks[:, 345].any() or cut.any() or _is_digit(blocks[:, 135]).any())


def _is_digit(values: np.ndarray) -> np.ndarray:
    """Which bytes are octal digits."""
    return (values - np.uint8(0x30)) < 8  # what is below "0" wraps around


def _are_numbers(columns: np.ndarray) -> bool:
    """Whether every row of `columns` [h, width] is octal digits followed by spaces and NULs."""
    digit = _is_digit(columns)
    blank = (columns == 0) | (columns == 0x20)
    late = ~digit[:, :-1] & digit[:, 1:]
    return bool((digit | blank).all() and not late.any())
