"""Deterministic, atomic writing of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from neuclip_scale.data.shards.names import ShardError, is_unsafe, split_name
from neuclip_scale.files import atomic_file


def write_shard(path: str | os.PathLike[str], samples: Iterable[Mapping[str, Any]]) -> int:
    """Write `samples` as one tar and return how many there were; equal samples always give equal bytes.

    A sample is webdataset's: `__key__` and one entry per extension, of bytes, str (written as UTF-8) or dict
    (written as JSON with sorted keys). The file appears under `path` only when it is complete and on disk.
    Raises `ShardError` for a missing, repeated or unreadable key and for values of other types.
    """
    from webdataset import TarWriter  # imports torch, which readers of shards do not need

    path = os.fspath(path)
    seen: set[str] = set()
    # pax adds headers only for names that ustar cannot hold; an integer mtime needs none.
    options: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "format": "PAX_FORMAT"}
    with atomic_file(path) as stream, TarWriter(stream, encoder=False, **options) as tar:
        for sample in samples:
            tar.write(_encode_sample(sample, path, seen))
    return len(seen)


def _encode_sample(sample: Mapping[str, Any], path: str, seen: set[str]) -> dict[str, Any]:
    key = sample.get("__key__")
    if not isinstance(key, str) or is_unsafe(key) or split_name(f"{key}.x") != (key, "x"):
        raise ShardError(f"{path}: __key__ {key!r}: give a relative name without a dot in its last part.")
    if key in seen:
        raise ShardError(f"{path}: __key__ {key!r} is given twice: keys must be unique in a shard.")
    seen.add(key)
    members = {name: _encode(value, f"{path}: {key}.{name}") for name, value in sample.items() if name[0] != "_"}
    return {"__key__": key, **members}


def _encode(value: Any, where: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise ShardError(f"{where} is a {type(value).__name__}: give bytes, str or a dict.")
