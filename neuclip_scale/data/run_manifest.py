"""The manifest of a run: the one in its folder while the shards are still the same, else a new one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError, DataConfig
from neuclip_scale.data.cache import ShardCache, cache_of
from neuclip_scale.data.indexing import Describe
from neuclip_scale.data.manifest import Manifest, ManifestError, ShardEntry, assemble_manifest
from neuclip_scale.data.manifest_file import SUFFIXES
from neuclip_scale.data.shards import expand_source, split_sources, storage

_THREADS = 8  # they hide the latency of a network file system


class NoManifestError(ManifestError):
    """A manifest that data.train names and that is not there."""

    exit_status = 2


Wanted = tuple[str, int]
"""Address of a shard and the source it belongs to."""


def run_manifest(path: Path, section: DataConfig) -> Manifest:
    """The manifest at `path` if it still holds for `data.train`, else one that all ranks make together and that is
    saved there (collective). Raises `ManifestError`, `ConfigError`, `ShardError`.
    """
    cache = cache_of(section)

    def known() -> tuple[list[Wanted], dict[str, ShardEntry], Manifest | None]:
        wanted, entries = _resolve(section, cache)
        saved = Manifest.load(path) if path.exists() else None
        if saved is None or [(s.path, s.source) for s in saved.shards] != wanted:
            return wanted, entries, None
        # Millions of shards that a manifest describes are not looked at now: each is when it is read.
        if not Manifest(tuple(shard for shard in saved.shards if shard.path not in entries)).is_current():
            return wanted, entries, None
        # A manifest that was made anew may tell of other contents.
        changed = any(entries and _content(shard) != _content(entries.get(shard.path, shard)) for shard in saved.shards)
        return wanted, entries, None if changed else saved

    wanted, entries, manifest = distributed.on_main(known)
    if manifest is not None:
        return manifest
    rank, world_size = distributed.rank(), distributed.world_size()
    missing = [address for address, _ in wanted if address not in entries]
    describe = Describe(cache.folder, cache.max_bytes, counts_of="remote")
    found = list(describe.rows(missing[rank::world_size], ThreadPoolExecutor(_THREADS)))
    rows = {row["path"]: row for part in distributed.gather_objects(found) for row in part}
    rows |= {address: asdict(entry) for address, entry in entries.items()}
    manifest = assemble_manifest([rows[address] | {"source": source} for address, source in wanted])
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.save(path)
    return manifest


def _content(shard: ShardEntry) -> ShardEntry:
    return replace(shard, first_index=0, source=0)


def _resolve(section: DataConfig, cache: ShardCache) -> tuple[list[Wanted], dict[str, ShardEntry]]:
    """The shards in the order of the run, and what manifests among the sources say of theirs."""
    parts = split_sources(section.train)
    if section.weights and len(section.weights) != len(parts):
        raise ConfigError(
            "data.weights",
            list(section.weights),
            f"data.train has {len(parts)} source(s)",
            "Give one weight for each part between `::`.",
        )
    entries: dict[str, ShardEntry] = {}
    sources: list[list[str]] = []
    for part in parts:
        if part.partition("?")[0].endswith(SUFFIXES) and not storage.is_pipe(part):
            shards = _read_manifest(part, cache).shards
            entries |= {shard.path: shard for shard in shards}
            sources.append([shard.path for shard in shards])
        else:
            # The saved manifest lies elsewhere, and relative paths in it would be of its folder.
            found = expand_source(part)
            sources.append([each if storage.is_remote(each) else os.path.abspath(each) for each in found])
    if not section.weights:
        return [(address, 0) for address in sorted({each for source in sources for each in source})], entries
    wanted = [(address, number) for number, source in enumerate(sources) for address in sorted(set(source))]
    _check_apart(wanted, parts)
    return wanted, entries


def _check_apart(wanted: Sequence[Wanted], parts: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for address, source in wanted:
        if address in seen:
            raise ConfigError(
                "data.train",
                parts[source],
                f"{address} belongs to source {seen[address] + 1} too",
                "With data.weights a shard belongs to one source.",
            )
        seen[address] = source


def _read_manifest(part: str, cache: ShardCache) -> Manifest:
    if storage.is_remote(part):
        address, mark, query = part.partition("?")
        with cache.fetched_now(part, Path(address).suffix) as path:  # a cached copy could be of another day
            manifest = Manifest.load(path, folder=address.rpartition("/")[0], query=mark + query)
    elif not Path(part).is_file():
        raise NoManifestError(f"manifest {part}: there is no such file. Make it with `neuclip data index`.")
    else:
        manifest = Manifest.load(part)
    commands = [shard.path for shard in manifest.shards if storage.is_pipe(shard.path)]
    if commands:
        raise ManifestError(
            f"manifest {part}: names a command ({commands[0]!r}), and a file that may come from others must not "
            "run one. Give pipe: addresses in data.train itself."
        )
    return manifest
