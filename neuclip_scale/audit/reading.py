"""Reading one download as tables: what was attempted, what its tars hold, and with `--deep` what its pictures are."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuclip_scale.audit import changes
from neuclip_scale.audit.downloads import Download
from neuclip_scale.audit.errors import AuditError
from neuclip_scale.audit.fates import Sources
from neuclip_scale.audit.identity import Identity
from neuclip_scale.audit.pictures import PictureShard, scan_pictures
from neuclip_scale.audit.reasons import hosts_reached, with_resolver_failures
from neuclip_scale.audit.scanning import ScanJob, ScannedShard
from neuclip_scale.data.manifest import Manifest, ShardEntry
from neuclip_scale.data.shards import ShardError
from neuclip_scale.queries.engines import Engine
from neuclip_scale.reshard.workers import ordered

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done of it, and the whole."""


@dataclass(frozen=True)
class ReadDownload:
    """One download, read."""

    download: Download
    shards: tuple[ScannedShard, ...]
    attempts: Any | None
    """With `uid`, `url`, `host`, `key`, `shard`, `status`, `reason`, `sha256`; None without a parquet."""
    contents: Any | None
    """With `uid`, `own`, `key`, `shard`, `position`, `fault`, `sha256`; None without a tar. `own` is what
    `neuclip reshard` knows the sample by: the same as `uid` unless urls tell samples apart."""
    looks: Any | None = None
    """See `changes.looks`; None without `--deep`."""

    @property
    def sources(self) -> Sources:
        """For the fates of samples."""
        damaged = tuple(shard.name for shard in self.shards if shard.tar_fault)
        return Sources(self.attempts, self.contents, damaged, self.tells_all_attempts)

    @property
    def tells_all_attempts(self) -> bool:
        """Whether every shard has a parquet that can be read."""
        return all(shard.num_attempted is not None for shard in self.shards)

    @property
    def tars(self) -> set[str]:
        """Real paths of its tars."""
        return {os.path.realpath(shard.tar) for shard in self.download.shards if shard.tar}

    @property
    def num_by_key(self) -> int:
        """Samples whose json and parquet tell no identity, so that their keys must do."""
        return sum(shard.num_by_key for shard in self.shards)

    @property
    def fingerprint(self) -> str | None:
        """That of a training run on these tars, see `Manifest.fingerprint`; None without samples."""
        facts = {shard.name: shard for shard in self.shards}
        tars = [(str(shard.tar), facts[shard.name]) for shard in self.download.shards if shard.tar]
        entries = [ShardEntry(path, found.num_samples or 0, found.num_bytes, 0, 0) for path, found in sorted(tars)]
        return Manifest(tuple(entries)).fingerprint if entries else None

    @property
    def damaged(self) -> list[dict[str, str]]:
        """Shards with a fault, and which."""
        return [
            {"shard": shard.name, "fault": f"{kind}: {fault}"}
            for shard in self.shards
            for kind, fault in (("tar", shard.tar_fault), ("parquet", shard.parquet_fault))
            if fault
        ]

    def originals(self, published: Any) -> Any:
        """What is known of the bytes that were fetched, see `changes.originals`, with `url`."""
        found = changes.originals(self.contents if self.attempts is None else self.attempts)
        return found if "url" in found.columns else found.inner_join(published.select("uid", "url"), "uid")


def read_download(
    download: Download,
    identity: Identity,
    engine: Engine,
    cache: Path,
    pool: ProcessPoolExecutor | None,
    num_workers: int,
    progress: Progress,
) -> ReadDownload:
    """Read every shard, or take over what `cache` has of it; raises `AuditError` when results cannot be written."""
    job, stage, shards = ScanJob(cache, identity), f"reading {download.name}", []
    try:
        for shard in ordered(pool, job, download.shards, 4 * num_workers):
            shards.append(shard)
            progress(stage, len(shards), len(download.shards))
    except (OSError, ShardError) as error:
        what = f"{error.filename or ''} {error.strerror or error}" if isinstance(error, OSError) else str(error)
        raise AuditError(f"{stage}: {what}. Mend that and run the same command again: it goes on.") from error
    attempts, contents = (
        engine.parquet(files) if (files := job.files(kind, download.shards)) else None
        for kind in ("attempts", "contents")
    )
    return ReadDownload(download, tuple(shards), attempts, contents)


def tell_resolver_failures(downloads: list[ReadDownload], engine: Engine, path: Path) -> list[ReadDownload]:
    """The same with the reason `resolver` for names that were known in another attempt of any download.

    The hosts that were reached are kept at `path`.
    """
    known = [hosts_reached(read.attempts) for read in downloads if read.attempts is not None]
    if not known:
        return downloads
    if not path.exists():
        engine.save(known[0].union(*known[1:], distinct=True) if len(known) > 1 else known[0], path)
    reached = engine.parquet([path])
    return [
        read if read.attempts is None else replace(read, attempts=with_resolver_failures(read.attempts, reached))
        for read in downloads
    ]


def decode_pictures(
    read: ReadDownload, engine: Engine, cache: Path, num_workers: int, progress: Progress
) -> ReadDownload:
    """The same with the looks of its pictures, and with those that cannot be decoded among the faults.

    Raises `AuditError` for a tar that can no longer be read as it was.
    """
    contents, done = read.contents, 0
    if contents is None:
        return read
    if isinstance(read.download.path, str):
        raise AuditError(f"--deep: {read.download.path} is remote, and every picture would be fetched. Copy it first.")
    tars = [(shard.name, Path(shard.tar)) for shard in read.download.shards if shard.tar]

    def count(_: PictureShard) -> None:
        nonlocal done
        done += 1
        progress(f"decoding {read.download.name}", done, len(tars))

    scan = scan_pictures(tars, cache, num_workers, count)
    num_samples = {shard.name: shard.num_samples for shard in read.shards}
    for shard in scan.shards:
        if shard.num_samples != num_samples[shard.name]:  # else pictures that nobody decoded would count as good
            what = shard.fault or "it changed since it was read"
            raise AuditError(f"--deep: {shard.name}.tar: {what}. Mend that and run the same command again: it goes on.")
    pictures = engine.parquet(scan.files)
    place = ["shard", "position"]
    looks = changes.looks(pictures.drop("uid").inner_join(contents.select("uid", *place), place))
    joined = contents.left_join(pictures.select(*place, seen="fault"), place)
    faults = joined.mutate(fault=joined.fault.coalesce(joined.seen)).select(*contents.columns)
    return replace(read, contents=faults, looks=looks)
