"""The training set as a list of shards with their sample counts: what the data order is computed from."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neuclip_scale.data.shards import index_shard
from neuclip_scale.files import atomic_file

_FORMAT = 1


class ManifestError(ValueError):
    """A training set or a saved manifest that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard; its sample at `position` has the dense sample index `first_index + position`."""

    path: str
    num_samples: int
    num_bytes: int
    mtime_ns: int
    first_index: int
    fault: str = ""
    """What is wrong with the shard (cut off, empty, ...); empty when nothing is."""


@dataclass(frozen=True)
class Manifest:
    """All shards of a training set, in the order of their paths."""

    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        """n, the number of pairs; sample indices run from 0 to n - 1."""
        last = self.shards[-1]
        return last.first_index + last.num_samples

    @property
    def faulty_shards(self) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.fault)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over names, counts and sizes: equal for a copy of the same data in another folder."""
        rows = [(Path(shard.path).name, shard.num_samples, shard.num_bytes) for shard in self.shards]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(row in `shards`, position in that shard) of a dense sample index."""
        # Empty shards share their first index with the next one; the last of these holds the samples.
        shard = bisect_right(self._first_indices, sample_index) - 1
        return shard, sample_index - self._first_indices[shard]

    @cached_property
    def _first_indices(self) -> list[int]:
        return [shard.first_index for shard in self.shards]

    def is_current(self) -> bool:
        """Whether every shard still has the size and modification time it was indexed with."""
        return all(_stat(shard.path) == (shard.num_bytes, shard.mtime_ns) for shard in self.shards)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, atomically."""
        document = {"format": _FORMAT, "shards": [asdict(shard) for shard in self.shards]}
        with atomic_file(path) as stream:
            stream.write(json.dumps(document, indent=1).encode("utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read what `save` wrote; raises `ManifestError` for anything else. See `is_current`."""
        try:
            document = json.loads(Path(path).read_bytes())
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
            shards = tuple(ShardEntry(**entry) for entry in document["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"manifest {path}: {error}. Delete it: it is made anew.") from error
        return cls(_checked(shards))


def build_manifest(paths: Sequence[str], num_threads: int = 8) -> Manifest:
    """Index the headers of every shard; faulty and empty shards are kept in the list with their fault.

    Threads hide the latency of a network file system; parsing itself is one core's work. Raises
    `ManifestError` when no shard holds a sample or a file cannot be read.
    """
    if not paths:
        raise ManifestError("no shard was given: set data.train to a folder of .tar files or a pattern.")
    return assemble_manifest(index_shards(paths, num_threads))


def index_shards(paths: Sequence[str], num_threads: int = 8) -> list[dict[str, Any]]:
    """What `assemble_manifest` needs of each shard; ranks can share the work. Raises `ManifestError`."""
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        return list(pool.map(_index_row, paths))


def assemble_manifest(rows: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest of shards indexed by `index_shards`, in this order; raises `ManifestError` if all are empty."""
    entries, first_index = [], 0
    for row in rows:
        entries.append(ShardEntry(first_index=first_index, **row))
        first_index += entries[-1].num_samples
    return Manifest(_checked(tuple(entries)))


def _index_row(path: str) -> dict[str, Any]:
    try:
        mtime_ns = os.stat(path).st_mtime_ns
        index = index_shard(path)
    except OSError as error:
        raise ManifestError(f"shard {path}: {error.strerror}. It must be a readable file.") from error
    return {
        "path": path,
        "num_samples": index.num_samples,
        "num_bytes": index.num_bytes,
        "mtime_ns": mtime_ns,
        "fault": index.fault,
    }


def _checked(shards: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
    if not any(shard.num_samples for shard in shards):
        first = f"; the first, {shards[0].path}: {shards[0].fault}" if shards else ""
        raise ManifestError(
            f"none of {len(shards)} shard(s) holds a sample{first}. "
            "Shards are plain tars of KEY.jpg, KEY.txt, KEY.json as img2dataset writes them."
        )
    return shards


def _stat(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
