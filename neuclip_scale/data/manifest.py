"""The training set as a list of shards with their sample counts: what the data order is computed from."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from neuclip_scale.data import manifest_file
from neuclip_scale.data.shards import index_shard, storage


class ManifestError(ValueError):
    """A training set or a saved manifest that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard; its sample at `position` has the dense sample index `first_index + position`."""

    path: str
    num_samples: int
    num_bytes: int
    mtime_ns: int
    """Time of change of a local file, 0 of a remote one."""
    first_index: int
    fault: str = ""
    """What is wrong with the shard (cut off, empty, ...); empty when nothing is."""
    source: int = 0
    """Which of the sources joined with `::` it belongs to, where these have weights."""
    version: str = ""
    """ETag or time of change of a remote shard, empty where none is told."""
    sha256: str = ""
    """Of the whole file, 64 hex digits, where it was asked for."""
    counted_by: str = "headers"
    """What told the number of samples: the tar's headers, or `sizes.json` or `_stats.json` beside it."""


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
        rows = [(storage.base_name(shard.path), shard.num_samples, shard.num_bytes) for shard in self.shards]
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
        """Whether every local shard still has the size and modification time it was indexed with.

        Remote ones are not asked for: each is held against its entry when it is fetched.
        """
        local = (shard for shard in self.shards if not storage.is_remote(shard.path))
        return all(_stat(shard.path) == (shard.num_bytes, shard.mtime_ns) for shard in local)

    def save(self, path: str | os.PathLike[str], *, relative: bool = False) -> None:
        """Write as JSON, or as Parquet where the name ends so, atomically; `relative` to the file where it can be."""
        folder = os.path.join(os.path.abspath(os.path.dirname(os.fspath(path))), "")
        rows = [dict(vars(shard)) for shard in self.shards]
        for row in rows if relative else ():
            if not storage.is_remote(row["path"]):
                row["path"] = os.path.abspath(row["path"]).removeprefix(folder)
        manifest_file.write(Path(path), rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, folder: str = "", query: str = "") -> Manifest:
        """Read what `save` wrote; raises `ManifestError` for anything else. See `is_current`.

        Relative paths are of the file's own folder, or of the address `folder`, whose `query` (`?endpoint_override=`)
        they get too: it names the server. Commands (`pipe:`) in the file are
        kept: whoever reads one from a stranger looks for them first, as `run_manifest` does.
        """
        folder = folder or os.path.abspath(os.path.dirname(os.fspath(path)))
        try:
            rows = manifest_file.read(Path(path))
            shards = tuple(ShardEntry(**row) for row in rows)
        except OSError as error:
            remedy = "It is a file that `neuclip data index` writes; give that."
            raise ManifestError(f"manifest {path}: cannot be read ({error.strerror or error}). {remedy}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"manifest {path}: {error}. Delete it and index the shards anew.") from error
        return cls(_checked(tuple(replace(shard, path=_in_folder(shard.path, folder, query)) for shard in shards)))


def build_manifest(paths: Sequence[str], num_threads: int = 8) -> Manifest:
    """Index the headers of every local shard; faulty and empty shards are kept in the list with their fault.

    Threads hide the latency of a network file system; parsing itself is one core's work. See `data.indexing` for
    more of both. Raises
    `ManifestError` when no shard holds a sample or a file cannot be read.
    """
    if not paths:
        raise ManifestError("no shard was given: set data.train to a folder of .tar files or a pattern.")
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        return assemble_manifest(list(pool.map(index_row, paths)))


def assemble_manifest(rows: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest of shards described by `index_row`, in this order; raises `ManifestError` if all are empty."""
    entries, first_index = [], 0
    for row in rows:
        entries.append(ShardEntry(**{**row, "first_index": first_index}))
        first_index += entries[-1].num_samples
    return Manifest(_checked(tuple(entries)))


def index_row(path: str) -> dict[str, Any]:
    """What a manifest holds of a local shard but its first index; raises `ManifestError`."""
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


def _in_folder(path: str, folder: str, query: str) -> str:
    if storage.is_remote(path) or os.path.isabs(path):
        return path
    return os.path.join(folder, path) + query


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
