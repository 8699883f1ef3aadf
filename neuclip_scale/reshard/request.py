"""Which uids are wanted, and how often each."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from neuclip_scale.reshard.errors import ReshardError, told_to_user
from neuclip_scale.reshard.uids import Uids, parse_uids

SUBSET_DTYPE = np.dtype("u8,u8")
_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Request:
    """Wanted uids, sorted, each once; 16 bytes a uid."""

    uids: Uids
    counts: np.ndarray | None = None
    """[n] uint32, how often each is wanted; None when each is wanted once."""
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    """Those that are no 32 hexadecimal digits."""
    digest: str = ""
    """Of the file they came from."""

    @property
    def num_requested(self) -> int:
        """Samples to write if all are found."""
        return len(self.uids.high) if self.counts is None else int(self.counts.sum(dtype=np.int64))

    def find(self, wanted: Uids) -> np.ndarray:
        """[n] int64, row of each of `wanted` here, -1 where it is not."""
        high, low = self.uids
        if not len(high):
            return np.full(len(wanted.high), -1)
        order = np.argsort(wanted.high)  # neighbours share cache lines of the search
        query = wanted.high[order]
        left = np.searchsorted(high, query)
        clipped = np.minimum(left, len(high) - 1)
        rows = np.where((high[clipped] == query) & (low[clipped] == wanted.low[order]), clipped, -1)
        following = np.minimum(clipped + 1, len(high) - 1)
        tied = np.flatnonzero((high[following] == query) & (following > clipped) & (rows < 0))
        if len(tied):
            right = np.searchsorted(high, query[tied], side="right")
            for value in np.unique(query[tied]):
                same = query[tied] == value
                begin, end = int(left[tied[same][0]]), int(right[same][0])
                asked = wanted.low[order[tied[same]]]
                place = np.minimum(begin + np.searchsorted(low[begin:end], asked), end - 1)
                rows[tied[same]] = np.where(low[place] == asked, place, -1)
        found = np.empty_like(rows)
        found[order] = rows
        return found


def load_request(path: Path) -> Request:
    """Read DataComp's `u8,u8` .npy, a parquet with a `uid` column, or a text with one uid a line.

    Raises `ReshardError` for anything else and for an empty list.
    """
    with told_to_user("--subset-file"), open(path, "rb") as file:
        head = file.read(6)
        file.seek(0)
        digest = hashlib.file_digest(file, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
        file.seek(0)
        texts: dict[tuple[int, int], str] = {}
        uids, counts = _sorted_once(_read(file, path, head, texts))  # keeps no second copy alive
    if not len(uids.high):
        raise ReshardError(f"--subset-file {path}: holds no uid. Give a list of uids, or none to keep everything.")
    return Request(uids, counts, texts, digest[:32])


def _read(file: IO[bytes], path: Path, head: bytes, texts: dict[tuple[int, int], str]) -> Uids:
    if head == b"\x93NUMPY":
        return _read_npy(file, path)
    return _collect(_parquet_texts(path) if head[:4] == b"PAR1" else _text_lines(file, path), texts)


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.blake2b()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_npy(file: IO[bytes], path: Path) -> Uids:
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except ValueError as error:
        raise ReshardError(f"--subset-file {path}: {error}. Save it with numpy.save.") from error
    if dtype.newbyteorder("=") != SUBSET_DTYPE or len(shape) != 1:
        raise ReshardError(
            f"--subset-file {path}: dtype {dtype}, shape {shape}. "
            "DataComp's form is one axis of dtype 'u8,u8': high and low 64 bits of each uid."
        )
    room = (os.fstat(file.fileno()).st_size - file.tell()) // dtype.itemsize
    if not 0 <= shape[0] <= room:  # before there is memory for what its header claims
        raise ReshardError(f"--subset-file {path}: ends after {room} of {shape[0]} uids. Copy it again.")
    uids = Uids(np.empty(shape[0], dtype=np.uint64), np.empty(shape[0], dtype=np.uint64))
    for begin in range(0, shape[0], _ROWS_AT_ONCE):  # whole, it would lie in memory twice
        count = min(_ROWS_AT_ONCE, shape[0] - begin)
        rows = np.fromfile(file, dtype=dtype, count=count)
        if len(rows) < count:
            end = begin + len(rows)
            raise ReshardError(f"--subset-file {path}: ends after {end} of {shape[0]} uids. Copy it again.")
        uids.high[begin : begin + len(rows)] = rows["f0"]
        uids.low[begin : begin + len(rows)] = rows["f1"]
    return uids


def _parquet_texts(path: Path) -> Iterator[list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            if "uid" not in parquet.schema_arrow.names:
                raise ReshardError(f"--subset-file {path}: has no column uid, but {parquet.schema_arrow.names}.")
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=["uid"]):
                yield [str(text) for text in batch.column(0).to_pylist() if text is not None]
    except pa.ArrowException as error:
        raise ReshardError(f"--subset-file {path}: not a readable parquet file ({error}).") from error


def _text_lines(file: IO[bytes], path: Path) -> Iterator[list[str]]:
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # Windows puts one before the first uid
        file.seek(0)
    lines = (line.strip() for line in file)
    while chunk := list(islice(lines, _ROWS_AT_ONCE)):
        try:
            yield [line.decode("utf-8") for line in chunk if line]
        except UnicodeDecodeError as error:
            raise ReshardError(
                f"--subset-file {path}: neither .npy nor parquet nor UTF-8 text ({error}). Give one uid a line."
            ) from error


def _collect(chunks: Iterator[list[str]], texts: dict[tuple[int, int], str]) -> Uids:
    """Numbers of all chunks; those that are no digits are put into `texts`."""
    parts = []
    for chunk in chunks:
        uids, others = parse_uids(chunk)
        parts.append(uids)
        texts.update({(int(uids.high[row]), int(uids.low[row])): text for row, text in others.items()})
    if not parts:
        return Uids(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64))
    return Uids(np.concatenate([part.high for part in parts]), np.concatenate([part.low for part in parts]))


def _sorted_once(uids: Uids) -> tuple[Uids, np.ndarray | None]:
    """Sort and count; needs 16 bytes a uid beside the 16 they take."""
    high, low = uids
    del uids
    if not _is_sorted(high, low):
        order = np.argsort(high)
        high = high[order]
        low = low[order]
        del order
        _sort_ties(high, low)
    new = np.empty(len(high), dtype=bool)
    new[:1] = True
    for begin in range(1, len(high), _ROWS_AT_ONCE):
        here, before = slice(begin, begin + _ROWS_AT_ONCE), slice(begin - 1, begin + _ROWS_AT_ONCE - 1)
        count = len(high[here])
        new[here] = (high[here] != high[before][:count]) | (low[here] != low[before][:count])
    if new.all():
        return Uids(high, low), None
    first = np.flatnonzero(new)
    counts = np.diff(first, append=len(high)).astype(np.uint32)
    high = high[first]
    low = low[first]
    return Uids(high, low), counts


def _is_sorted(high: np.ndarray, low: np.ndarray) -> bool:
    for begin in range(0, len(high) - 1, _ROWS_AT_ONCE):
        a, b = high[begin : begin + _ROWS_AT_ONCE], high[begin + 1 : begin + 1 + _ROWS_AT_ONCE]
        c, d = low[begin : begin + _ROWS_AT_ONCE], low[begin + 1 : begin + 1 + _ROWS_AT_ONCE]
        a, c = a[: len(b)], c[: len(d)]
        if not ((a < b) | ((a == b) & (c <= d))).all():
            return False
    return True


def _sort_ties(high: np.ndarray, low: np.ndarray) -> None:
    """Sort `low` in place inside each run of equal `high`."""
    same = np.flatnonzero(high[1:] == high[:-1])
    if not len(same):
        return
    breaks = np.flatnonzero(np.diff(same) > 1)
    begins, ends = same[np.concatenate([[0], breaks + 1])], same[np.concatenate([breaks, [-1]])] + 2
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        low[begin:end].sort()
