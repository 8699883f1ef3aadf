"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_UNFINISHED = ".unfinished"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give a full disk's error inside the block the name of the file, which the system does not tell of a write."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[io.BufferedWriter]:
    """A binary file that takes the name `path` once the block ends and its bytes are on the disk.

    A kill at any moment leaves the old or the new content; so does an exception, and no partial file stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == os.fspath(partial):
            error.filename, error.filename2 = os.fspath(path), None  # the name that the user has given
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files to, which are moved to `path` once the block ends and their bytes are on the disk.

    It lies in `path`, which may be the root of a file system. What a kill leaves of it makes no obstacle to the next
    try (`is_occupied`), which replaces it; an exception leaves an empty folder at most.
    """
    path = Path(path)
    partial = path / _UNFINISHED
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        written = sorted(partial.iterdir())
        for file in written:
            sync_folder(file)
        for file in written:
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(path)


def is_occupied(path: Path) -> bool:
    """Whether there is something at `path` that `new_folder` must not write over."""
    if not path.is_dir():
        return path.exists()
    names = os.listdir(path)
    return bool(names) and _UNFINISHED not in names


def append_whole(file: BinaryIO, line: bytes) -> None:
    """Write all of `line` to a file that was opened by its path without a buffer; raises OSError.

    On a disk that gets full the system takes a part of it, and says so when it is asked for the rest.
    """
    with naming(file.name):
        while line:
            line = line[file.write(line) :]


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, in one step, making the folders above; raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Replace `path` by `value` as indented, strict JSON; for non-finite numbers see `json_ready`."""
    text = json.dumps(json_ready(value), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def json_ready(value: Any) -> Any:
    """Copy `value` with non-finite floats as the strings "NaN", "Infinity" and "-Infinity".

    JSON has no such numbers, and many readers refuse Python's bare NaN. The strings keep the difference that
    null would lose, and `float()` and JavaScript's `Number()` read them back.
    """
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return str(value) if isinstance(value, os.PathLike) else value


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder`, or a file's bytes, to the disk, so that a rename there survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
