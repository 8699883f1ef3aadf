"""Describing many shards: by their tar headers, or by the counts that img2dataset and DataComp leave beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from neuclip_scale.data.cache import ShardCache
from neuclip_scale.data.manifest import ManifestError, index_row
from neuclip_scale.data.shards import index_shard, storage
from neuclip_scale.files import naming

Row = dict[str, Any]
"""What a manifest holds of a shard but its first index."""

MAX_SIDECAR_BYTES = 256 << 20
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Describe:
    """How shards are described; can be pickled."""

    cache_folder: Path
    cache_bytes: int
    counts_of: Literal["all", "remote", "none"] = "all"
    """Shards whose count is taken over from a file beside them, where there is one, instead of reading the tar."""
    sha256: bool = False

    def rows(self, addresses: Sequence[str], pool: Executor, known: Iterable[Row] = ()) -> Iterator[Row]:
        """One row an address, as they become known; raises `ManifestError`.

        `known` rows are taken over where the shard has neither changed its size nor its time.
        """
        before = {row["path"]: row for row in known}
        counts = _counts_beside([address for address in addresses if self._takes_over(address)])
        jobs = [
            pool.submit(_describe, self, address, before.get(address), counts.get(address)) for address in addresses
        ]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _takes_over(self, address: str) -> bool:
        if self.sha256 or storage.is_pipe(address):
            return False
        return self.counts_of == "all" or (self.counts_of == "remote" and storage.is_remote(address))


def _describe(how: Describe, address: str, before: Row | None, counts: tuple[int, str] | None) -> Row:
    try:
        facts = _facts(address)
        told = {key: before.get(key) for key in facts} if before else None
        if before is not None and told == facts and (before.get("sha256") or not how.sha256):
            return before
        if counts is None and how._takes_over(address):
            counts = _count_of_stats(address)
        if counts is not None:
            return {"path": address, "num_samples": counts[0], **facts, "fault": "", "counted_by": counts[1]}
        return _read(how, address, facts)
    except (OSError, storage.StorageError) as error:
        raise ManifestError(f"shard {address}: {error}. It must be there and readable.") from error


def _read(how: Describe, address: str, facts: Row) -> Row:
    if storage.is_remote(address):
        # Header after header would be a request each: a shard of 10,000 samples comes whole in the time of a few.
        cache = ShardCache(how.cache_folder, how.cache_bytes)
        version = facts.get("version", "")
        path = cache.local(address, version, anew=not version)
        index = index_shard(path)
        row = {
            "path": address,
            "num_samples": index.num_samples,
            **facts,
            "num_bytes": index.num_bytes,
            "fault": index.fault,
        }
    else:
        path, row = address, index_row(address)
    if how.sha256:
        row["sha256"] = file_sha256(path)
    return row


def file_sha256(path: str) -> str:
    """64 hex digits of a whole file; raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _facts(address: str) -> Row:
    if storage.is_pipe(address):
        return {"mtime_ns": 0, "version": ""}
    if storage.is_remote(address):
        facts = storage.facts(address)
        return {"num_bytes": facts.num_bytes, "mtime_ns": 0, "version": facts.version}
    status = os.stat(address)
    return {"num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _counts_beside(addresses: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Counts of `sizes.json`, which DataComp's resharder writes: one file for a folder of shards."""
    counts: dict[str, tuple[int, str]] = {}
    folders: dict[str, dict[str, Any]] = {}
    for address in addresses:
        folder, _, rest = address.rpartition("/")
        name, mark, query = rest.partition("?")
        key = f"{folder}/sizes.json{mark}{query}" if folder else "sizes.json"
        if key not in folders:
            folders[key] = _document(key)
        count = folders[key].get(name)
        if _is_count(count):
            counts[address] = (count, "sizes.json")
    return counts


def _count_of_stats(address: str) -> tuple[int, str] | None:
    """`successes` of img2dataset's `00000_stats.json`, written when the shard is complete."""
    name, mark, query = address.partition("?") if storage.is_remote(address) else (address, "", "")
    count = _document(f"{name.removesuffix('.tar')}_stats.json{mark}{query}").get("successes")
    return (count, "_stats.json") if _is_count(count) else None


def _document(address: str) -> dict[str, Any]:
    """A JSON object beside the shards; an empty one where there is none, or something else."""
    with contextlib.suppress(OSError, ValueError, RecursionError, storage.StorageError):
        document = json.loads(storage.read_small(address, MAX_SIDECAR_BYTES))
        if isinstance(document, dict):
            return document
    return {}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Journal:
    """Rows found so far, beside the manifest that is being made: an interrupted `neuclip data index` goes on."""

    def __init__(self, manifest: Path) -> None:
        self.path = manifest.with_name(f"{manifest.name}.rows.jsonl")

    def read(self) -> list[Row]:
        """Rows of an earlier attempt; the last line of a killed one may be half."""
        rows = []
        with contextlib.suppress(FileNotFoundError), open(self.path, encoding="utf-8") as stream:
            for line in stream:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("path"), str)]

    def write(self, rows: Iterable[Row], seen: Callable[[Row], None]) -> list[Row]:
        """Append rows as they come, and return them all."""
        done = []
        with naming(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write("\n")  # ends a half line
            for row in rows:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                seen(row)
                done.append(row)
        return done

    def remove(self) -> None:
        """The manifest is written."""
        self.path.unlink(missing_ok=True)
