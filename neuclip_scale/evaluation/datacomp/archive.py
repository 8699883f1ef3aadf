"""Sets as they lie on the hub without webdataset: one table (CSV) beside a zip or a folder of pictures.

Flickr, MSCOCO and WinoGAViL come like this. Nothing is extracted, and no name in a table becomes a path.
"""

from __future__ import annotations

import ast
import csv
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from neuclip_scale.data.shards import MAX_MEMBER_BYTES
from neuclip_scale.evaluation.datasets import IMAGE_KEYS, EvaluationDataError, ImageTransform, Unreadable, decode
from neuclip_scale.evaluation.sharing import Share

_DECODE_THREADS = 4
# What zipfile lets through of damaged bytes; ValueError: a name that is no UTF-8, or bzip2's.
_DAMAGE = (ValueError, struct.error, EOFError, zlib.error, lzma.LZMAError)


class Archive:
    """The pictures of a folder by file name or by its stem; those in zips too. Raises `EvaluationDataError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for path in sorted(folder.glob("*.zip")):
            try:
                archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, OSError, NotImplementedError, *_DAMAGE) as error:
                raise EvaluationDataError(f"{path} is no whole zip file ({error}): fetch it again.") from error
            for info in archive.infolist():
                self._add(info.filename, (archive, info))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._add(path.name, path)
        if not self._entries:
            raise EvaluationDataError(f"{folder} holds no picture: put the set's zip, or its pictures, there.")

    def _add(self, name: str, entry: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]) -> None:
        base = PurePosixPath(name).name
        stem, _, extension = base.rpartition(".")
        # Files that a Mac put beside the pictures start with a dot.
        if stem and not base.startswith(".") and extension.lower() in IMAGE_KEYS:
            self._entries.setdefault(base, entry)
            self._entries.setdefault(stem, entry)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> bytes | str:
        """Bytes of a picture, or what is wrong with it."""
        entry = self._entries.get(name)
        if entry is None:
            return f"no picture of this name in {self.folder}"
        try:
            with open(entry, "rb") if isinstance(entry, Path) else entry[0].open(entry[1]) as stream:
                data = bytes(stream.read(MAX_MEMBER_BYTES + 1))
        # RuntimeError: encrypted; NotImplementedError: a compression that Python lacks.
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, *_DAMAGE) as error:
            return f"unreadable ({error})"
        return data if len(data) <= MAX_MEMBER_BYTES else f"more than {MAX_MEMBER_BYTES} bytes"


def read_pictures(
    archive: Archive,
    names: Sequence[str],
    transform: ImageTransform,
    batch_size: int,
    share: Share,
    unreadable: Unreadable,
) -> Iterator[tuple[list[int], Tensor]]:
    """Positions in `names` and pictures [b, 3, H, W] of this share, `batch_size` names at a time."""
    load = partial(_load, archive, transform)
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for number, start in enumerate(range(0, len(names), batch_size)):
            if not share.owns(number):
                continue
            part = names[start : start + batch_size]
            positions, images = [], []
            for position, (name, image) in enumerate(zip(part, pool.map(load, part), strict=True), start=start):
                if isinstance(image, str):
                    unreadable.add(name, image)
                else:
                    positions.append(position)
                    images.append(image)
            if images:
                yield positions, torch.stack(images)


def _load(archive: Archive, transform: ImageTransform, name: str) -> Tensor | str:
    data = archive.read(name)
    return data if isinstance(data, str) else decode(data, transform)


def read_table(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of the folder's one CSV that has all of `columns`; raises `EvaluationDataError`."""
    csv.field_size_limit(1 << 24)
    found = []
    for path in sorted(folder.glob("*.csv")):
        try:
            with open(path, encoding="utf-8", newline="") as stream:
                reader = csv.DictReader(stream)
                if set(columns) <= set(reader.fieldnames or ()):
                    found.append((path, list(reader)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise EvaluationDataError(f"{path} is no CSV in UTF-8 ({error}): fetch it again.") from error
    if len(found) != 1:
        names = [path.name for path, _ in found]
        raise EvaluationDataError(
            f"{folder} needs one CSV file with the columns {', '.join(columns)}, and has {len(found)} {names}. Put the "
            "set's files there as they lie on the hub, or a set in clip_benchmark's webdataset layout."
        )
    path, rows = found[0]
    if not rows:
        raise EvaluationDataError(f"{path} has no row: fetch it again.")
    return rows


def parse_list(text: str | None) -> list[str]:
    """A list of texts, written as JSON or as Python writes it; raises ValueError."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval((text or "").strip())
        except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
            raise ValueError(f"not a list: {str(text)[:60]!r}") from error
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"not a list of texts: {str(text)[:60]!r}")
    return value
