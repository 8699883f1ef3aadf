"""Rows of one array of an .npz, read forward a block at a time, never the whole array.

An .npz is a zip of .npy files. Nothing in it is believed: no pickles, a bounded header, and sizes that must agree.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from neuclip_scale.subset.errors import DamagedFileError

MAX_WIDTH = 1 << 16
_BLOCK_BYTES = 16 << 20
_MAX_HEADER = 10_000


class EmbeddingRows:
    """An [n, d] array of floats inside an .npz."""

    def __init__(self, stream: IO[bytes], shape: tuple[int, int], dtype: np.dtype) -> None:
        self._stream, self.shape, self._dtype = stream, shape, dtype
        self._position = 0

    def blocks(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For growing `places` not before what was read: parts of them, and their rows as [m, d] float32.

        Raises `DamagedFileError` when the array ends too early or is not what was packed.
        """
        row_bytes = self.shape[1] * self._dtype.itemsize
        at_once = max(1, _BLOCK_BYTES // row_bytes)
        begin = 0
        while begin < len(places):
            first = int(places[begin])
            self._skip((first - self._position) * row_bytes)
            end = int(np.searchsorted(places, first + at_once))
            count = int(places[end - 1]) + 1 - first
            data = self._read(count * row_bytes)
            block = np.frombuffer(data, dtype=self._dtype).reshape(count, self.shape[1])
            self._position = first + count
            yield places[begin:end], block[places[begin:end] - first].astype(np.float32)
            begin = end

    def finish(self) -> None:
        """Read what is left, so that the checksum of the whole array is compared; raises `DamagedFileError`."""
        self._skip((self.shape[0] - self._position) * self.shape[1] * self._dtype.itemsize)
        with _told():
            if self._stream.read(1):
                raise DamagedFileError(".npz: holds more bytes than its shape tells")

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._read(min(count, _BLOCK_BYTES)))

    def _read(self, count: int) -> bytes:
        parts, left = [], count
        with _told():
            while left and (part := self._stream.read(left)):
                parts.append(part)
                left -= len(part)
        if left:
            raise DamagedFileError(".npz: ends in the middle of its rows")
        return b"".join(parts)


@contextmanager
def open_embeddings(path: Path, name: str, num_rows: int) -> Iterator[EmbeddingRows]:
    """The array `name` of the .npz at `path`, which must have a row for each of the parquet's `num_rows`.

    Raises `DamagedFileError` for a file that is not there, or not such an array.
    """
    with _told():
        archive = zipfile.ZipFile(path)
    with archive:
        try:
            member = archive.getinfo(f"{name}.npy")
        except KeyError as error:
            there = ", ".join(sorted(each.removesuffix(".npy") for each in archive.namelist())[:10])
            raise DamagedFileError(f".npz: has no array {name}, but {there or 'none'}") from error
        with _told():
            stream = archive.open(member)
        with stream:
            shape, dtype = _header(stream)
            if shape[0] != num_rows:
                raise DamagedFileError(f".npz: {name} has {shape[0]} rows, the parquet {num_rows}")
            yield EmbeddingRows(stream, shape, dtype)


def _header(stream: IO[bytes]) -> tuple[tuple[int, int], np.dtype]:
    with _told():
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise DamagedFileError(f".npz: version {version} of .npy")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream, max_header_size=_MAX_HEADER)
    if len(shape) != 2 or is_fortran or dtype.kind != "f" or dtype.itemsize > 8:
        raise DamagedFileError(f".npz: an array of {dtype}, shape {shape}; embeddings are floats, a row each")
    if not 0 < shape[1] <= MAX_WIDTH or shape[0] < 0:
        raise DamagedFileError(f".npz: shape {shape} is none of embeddings")
    return (int(shape[0]), int(shape[1])), dtype


@contextmanager
def _told() -> Iterator[None]:
    """Turn what zip, deflate and numpy raise for damage into `DamagedFileError`."""
    try:
        yield
    except DamagedFileError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise DamagedFileError(f".npz: {str(error) or type(error).__name__}") from error
