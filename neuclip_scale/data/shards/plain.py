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
from dataclasses import dataclass

import numpy as np

BLOCK = tarfile.BLOCKSIZE
PAX_HEADER = 0x78
"""Kind of a header, "x", whose content describes the next member."""

_WINDOW_BYTES = 8192
"""Read at once: the headers of a sample's small members, and of the next sample, come with one call."""
_FILES_AT_ONCE = 1024
"""Files whose headers are checked together: half a MiB or, with pax headers, three times that."""
_ZEROS = bytes(BLOCK)
_PAX_TIMES = re.compile(rb"([0-9]{1,3} [amc]time=-?[0-9.]+\n)+")
# Octal numbers: mode, uid, gid, size, mtime, checksum; devmajor, devminor.
_NUMBERS = (slice(100, 156), slice(329, 345))
_NUMBER_BEGINS = np.isin(np.r_[100:156, 329:345], (100, 108, 116, 124, 136, 148, 329, 337))


@dataclass(frozen=True)
class PlainFiles:
    """Regular files of a tar in file order: names, and where their bytes stand."""

    names: np.ndarray  # [m, 100] uint8, NULs after the name
    offsets: np.ndarray  # [m] int64
    sizes: np.ndarray  # [m] int64


def plain_files(descriptor: int, num_bytes: int) -> PlainFiles | None:
    """Regular files of an open tar of `num_bytes`; None when it is not plain to its proper end.

    Reads by pread: unlike a memory map it cannot kill the process when a shard is cut while it is read. Raises
    OSError when the file cannot be read.
    """
    names: list[np.ndarray] = []
    offsets: list[int] = []
    sizes: list[int] = []
    headers, after_pax = bytearray(), bytearray()  # those read but not yet checked; whether a pax header comes first
    window, start, offset = b"", 0, 0
    # This loop runs for every member: no calls but what it cannot do without. It only finds the headers.
    while True:
        at = offset - start
        if at + 3 * BLOCK > len(window):
            window, start, at = os.pread(descriptor, _WINDOW_BYTES, offset), offset, 0
            if len(window) < BLOCK:
                return None
        is_pax = window[at + 156] == PAX_HEADER
        header = at + 2 * BLOCK * is_pax  # a pax header has one block of records, or it is not plain
        try:
            size = int(window[header + 124 : header + 135], 8)
        except ValueError:
            break
        begin = header + BLOCK
        offset = start + begin + (size + BLOCK - 1) // BLOCK * BLOCK
        if size < 0 or offset > num_bytes or begin > len(window):
            return None
        headers += window[at:begin]
        after_pax.append(is_pax)
        offsets.append(start + begin)
        sizes.append(size)
        if len(after_pax) == _FILES_AT_ONCE:
            names.append(_checked_names(headers, after_pax))
            if not len(names[-1]):
                return None
            headers, after_pax = bytearray(), bytearray()
    # An archive has one file at least: the rest is for tarfile to judge.
    if window[at : at + BLOCK] != _ZEROS or not offsets:
        return None
    if after_pax:
        names.append(_checked_names(headers, after_pax))
        if not len(names[-1]):
            return None
    return PlainFiles(np.concatenate(names), np.array(offsets), np.array(sizes))


def _checked_names(headers: bytearray, after_pax: bytearray) -> np.ndarray:
    """Names [m, 100] of files by their headers, each after a pax header where told; none unless all are plain."""
    blocks = np.frombuffer(headers, dtype=np.uint8).reshape(-1, BLOCK)
    has_pax = np.frombuffer(after_pax, dtype=bool)
    file_at = np.cumsum(1 + 2 * has_pax) - 1
    pax_at = file_at[has_pax] - 2
    files, names = blocks[file_at], blocks[file_at, :100]
    slash = names == ord("/")
    is_plain = (
        are_sound(files)
        and are_files(files)
        and not (slash[:, :-1] & (names[:, 1:] == 0)).any()  # folders in tars older than POSIX
        and not slash[:, -1].any()
        and are_sound(blocks[pax_at])
        and _tell_times_only(blocks[pax_at + 1], octal(blocks[pax_at, 124:135]))
    )
    return names if is_plain else names[:0]


def _tell_times_only(contents: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether pax records, one block [p, 512] each, are whole and change neither name nor size of the next member."""
    rows = np.flatnonzero(~_are_one_mtime(contents, sizes))
    return all(_tells_times_only(contents[row].tobytes(), int(sizes[row])) for row in rows)


def _are_one_mtime(contents: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which blocks [p, 512] hold "NN mtime=SECONDS" and an end of line, NN bytes in all, as `tarfile` writes."""
    text, place = contents[:, :100], np.arange(100)
    digits = text[:, :2] - np.uint8(0x30)
    is_seconds = (text - np.uint8(ord("0")) < 10) | (text == ord("."))
    is_right = np.where(place < sizes[:, None] - 1, is_seconds, text == 0)
    is_right[:, 2:9] = text[:, 2:9] == np.frombuffer(b" mtime=", dtype=np.uint8)
    is_right[np.arange(len(text)), np.clip(sizes - 1, 9, 99)] = True
    ends = text[np.arange(len(text)), np.clip(sizes - 1, 9, 99)] == ord("\n")
    whole = (sizes == digits[:, 0] * 10 + digits[:, 1]) & (sizes > 10) & ends & ~contents[:, 100:].any(axis=1)
    return (digits < 10).all(axis=1) & is_right[:, 2:].all(axis=1) & whole


def _tells_times_only(content: bytes, size: int) -> bool:
    """The same for any times and any number of records."""
    records = content.rstrip(b"\0")
    if len(records) != size or not _PAX_TIMES.fullmatch(records):
        return False
    return all(int(record.split(b" ", 1)[0]) == len(record) for record in records.splitlines(keepends=True))


def are_sound(blocks: np.ndarray) -> bool:
    """Whether all headers [h, 512] uint8 have their checksum, octal numbers and a name in its first field alone."""
    numbers = np.concatenate([blocks[:, part] for part in _NUMBERS], axis=1)
    digit, blank = _is_digit(numbers), (numbers == 0) | (numbers == 0x20)
    late = digit[:, 1:] & ~digit[:, :-1] & ~_NUMBER_BEGINS[1:]
    stored, name = blocks[:, 148:156], blocks[:, :100]
    actual = blocks.sum(axis=1, dtype=np.uint32) - stored.sum(axis=1, dtype=np.uint32) + 8 * 0x20
    # A NUL ends a name, whatever follows; a ustar prefix would stand before it. The size is read without its last byte.
    cut = (name[:, :-1] == 0) & (name[:, 1:] != 0)
    wrong = late.any() or cut.any() or (octal(stored) != actual).any()
    return bool((digit | blank).all() and not (wrong or blocks[:, 345].any() or _is_digit(blocks[:, 135]).any()))


def are_files(blocks: np.ndarray) -> bool:
    """Whether all headers [h, 512] are of regular files: kind "0", and what it was before POSIX."""
    return bool(((blocks[:, 156] == ord("0")) | (blocks[:, 156] == 0)).all())


def octal(columns: np.ndarray) -> np.ndarray:
    """Numbers [h] int64 of which `columns` [h, width] hold the digits, followed by what is none."""
    digit = _is_digit(columns)
    width = columns.shape[1]
    whole = np.where(digit, columns - np.uint8(0x30), np.uint8(0)) @ (1 << 3 * np.arange(width - 1, -1, -1))
    return whole >> 3 * (width - digit.sum(axis=1))


def _is_digit(values: np.ndarray) -> np.ndarray:
    """Which bytes are octal digits."""
    return (values - np.uint8(0x30)) < 8  # what is below "0" wraps around
