"""`neuclip data index | check`: a training set's manifest, made once and held against the shards."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neuclip_scale.files import write_json

USAGE = """usage: neuclip data index SHARDS --output MANIFEST [--workers N] [--read-tars] [--sha256] [--json FILE]
       neuclip data check MANIFEST [--workers N] [--json FILE]

index  describe every shard (samples, bytes, first sample index, faults) in one file: .parquet, or .json for people
check  read every shard's headers again, and its bytes where the manifest has sha256, and list what differs
SHARDS is what data.train takes: a folder, a pattern, an address, several joined with `::`. A manifest is given to
training as data.train=MANIFEST. An interrupted index goes on when it is called again.
"""
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class IndexArguments:
    """Describe every shard of a training set in one file."""

    shards: Annotated[str, tyro.conf.Positional]
    """A folder, a brace pattern, a glob, an address (s3://, gs://, https://, ...), or several joined with `::`."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """File to write: .parquet or .json. Shards below its folder are named relative to it, so that both can move."""
    workers: int = os.cpu_count() or 1
    """Processes that read shards."""
    read_tars: bool = False
    """Read every tar, also where sizes.json or _stats.json beside it tells its number of samples."""
    sha256: bool = False
    """Also hash every shard, which reads all its bytes."""
    json: Path | None = None
    """Also write the summary to this file."""


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Hold a manifest against its shards."""

    manifest: Annotated[Path, tyro.conf.Positional]
    """What `neuclip data index` wrote."""
    workers: int = os.cpu_count() or 1
    """Processes that read shards."""
    json: Path | None = None
    """Also write what differs to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 for shards that cannot be read or differ, 2 for bad usage."""
    commands: dict[str, tuple[Callable[[Any], int], type]] = {
        "index": (_index, IndexArguments),
        "check": (_check, CheckArguments),
    }
    if not argv or argv[0] not in commands:
        asked = argv[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    run, kind = commands[argv[0]]
    return run(tyro.cli(kind, args=argv[1:], prog=f"neuclip data {argv[0]}"))


def _index(arguments: IndexArguments) -> int:
    from neuclip_scale.config import DataConfig
    from neuclip_scale.data.cache import cache_of
    from neuclip_scale.data.indexing import Describe, Journal
    from neuclip_scale.data.manifest import assemble_manifest
    from neuclip_scale.data.manifest_file import SUFFIXES
    from neuclip_scale.data.shards import expand_shards

    output = arguments.output
    if output.suffix not in SUFFIXES:
        print(f"error: --output {output}: the name must end in {' or '.join(SUFFIXES)}.", file=sys.stderr)
        return 2
    addresses = expand_shards(arguments.shards)
    output.parent.mkdir(parents=True, exist_ok=True)
    cache, journal = cache_of(DataConfig()), Journal(output)
    describe = Describe(
        cache.folder, cache.max_bytes, counts_of="none" if arguments.read_tars else "all", sha256=arguments.sha256
    )
    # A row that was only taken over does not serve where the tars are asked for.
    known = [row for row in journal.read() if not (arguments.read_tars and "counted_by" in row)]
    with _progress("shards", len(addresses)) as seen:
        rows = journal.write(describe.rows(addresses, _pool(arguments.workers), known), lambda _: seen())
    by_path = {row["path"]: row for row in rows}
    manifest = assemble_manifest([by_path[address] for address in addresses])
    manifest.save(output, relative=True)
    journal.remove()
    counted = Counter(shard.counted_by for shard in manifest.shards)
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    summary = {
        "manifest": str(output),
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": num_bytes,
        "counted_by": dict(counted),
        "faulty_shards": [{"shard": shard.path, "fault": shard.fault} for shard in manifest.faulty_shards],
        "fingerprint": manifest.fingerprint,
    }
    print(f"{len(manifest.shards)} shards, {manifest.num_samples} samples, {num_bytes / 1e9:.3f} GB: {output}")
    print("counted by " + ", ".join(f"{name} ({count})" for name, count in counted.items()))
    _list([f"{shard.path}: {shard.fault}" for shard in manifest.faulty_shards], "faulty shard(s)")
    if arguments.json:
        write_json(arguments.json, summary)
    return 0


def _check(arguments: CheckArguments) -> int:
    from neuclip_scale.config import DataConfig
    from neuclip_scale.data.cache import cache_of
    from neuclip_scale.data.checking import CheckShard
    from neuclip_scale.data.manifest import Manifest

    manifest, cache = Manifest.load(arguments.manifest), cache_of(DataConfig())
    work = CheckShard(cache.folder, cache.max_bytes)
    with _pool(arguments.workers) as pool, _progress("shards", len(manifest.shards)) as seen:
        found = []
        for differences in pool.map(work, manifest.shards):
            found += differences
            seen()
    _list(found, "difference(s)")
    if not found:
        print(f"{len(manifest.shards)} shards, {manifest.num_samples} samples: as the manifest says")
    if arguments.json:
        write_json(arguments.json, {"shards": len(manifest.shards), "differences": found})
    return 1 if found else 0


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned: a fork of a process in which an object store's client runs would hang in its locks.
    return ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn"))


class _progress:  # noqa: N801 - used as a function
    """A bar on the terminal; calling it moves it by one."""

    def __init__(self, what: str, total: int) -> None:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _list(lines: list[str], what: str) -> None:
    if lines:
        print(f"{len(lines)} {what}:")
        print("\n".join(f"  {line}" for line in lines[:_SHOWN]))
    if len(lines) > _SHOWN:
        print(f"  and {len(lines) - _SHOWN} more, all in --json")
