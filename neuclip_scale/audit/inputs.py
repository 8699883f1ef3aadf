"""Everything an audit reads, opened and checked before any work is done."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip_scale import __version__
from neuclip_scale.audit.downloads import Download, DownloadedShard, find_download
from neuclip_scale.audit.errors import AuditError, UsageError
from neuclip_scale.audit.identity import Identity
from neuclip_scale.audit.published import PublishedList, find_list
from neuclip_scale.audit.request import AuditRequest
from neuclip_scale.audit.trained import TrainedRun, read_run
from neuclip_scale.data.shards import ShardError, index_shard, read_member
from neuclip_scale.files import atomic_file
from neuclip_scale.reshard.json_uid import json_uid
from neuclip_scale.reshard.request import load_request
from neuclip_scale.reshard.uids import uid_text

_LOOKED_AT = 5
_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Inputs:
    """The parts of one audit."""

    published: PublishedList
    downloads: tuple[Download, ...]
    runs: tuple[TrainedRun, ...]
    identity: Identity
    notes: tuple[str, ...]
    """What was not given or could not be used, in words."""
    digest: str
    """Changes when any file does that was given."""


def open_inputs(request: AuditRequest, cache: Path) -> Inputs:
    """Find and check all inputs; raises `AuditError`, `UsageError`."""
    published = find_list(request.manifest, cache)
    downloads: list[Download] = []
    for text in request.downloads:
        downloads.append(find_download(text, [download.name for download in downloads]))
    runs: list[TrainedRun] = []
    for path in request.runs:
        runs.append(read_run(path, [run.name for run in runs]))
    identity, notes = _identity(request, published, downloads, cache)
    notes += [
        f"{d.name}: no parquet, so why samples are missing is not known." for d in downloads if not d.has_attempts
    ]
    notes += [
        f"{d.name}: no tars, so a sample counts as there when its download succeeded."
        for d in downloads
        if not d.has_tars
    ]
    notes += [
        f"{run.name}: its positions are taken from the number of samples seen, which is exact if it skipped none."
        for run in runs
        if not run.are_exact
    ]
    if not published.url:
        notes.append("The list has no url: losses by domain are left out, and so are lists to download again.")
    if request.subset_file and identity == "url":
        raise UsageError(f"--subset-file {request.subset_file}: holds uids, but samples are known by their urls here.")
    parts = [
        __version__,
        published.fingerprint,
        identity,
        "deep" if request.deep else "",
        *(f"{d.name} {shard.fingerprint}" for d in downloads for shard in d.shards),
    ]
    parts += [run.fingerprint for run in runs]
    if request.subset_file:
        parts.append(_stamp(request.subset_file))
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
    return Inputs(published, tuple(downloads), tuple(runs), identity, tuple(notes), digest)


def write_subset(path: Path, target: Path) -> None:
    """Write the uids of a subset file (`u8,u8` .npy, parquet or text) as a parquet with `uid`, each once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = load_request(path)
    schema = pa.schema([("uid", pa.string())])
    with atomic_file(target) as stream, pq.ParquetWriter(stream, schema) as writer:
        for start in range(0, len(wanted.uids.high), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            pairs = zip(wanted.uids.high[rows].tolist(), wanted.uids.low[rows].tolist(), strict=True)
            texts = [wanted.texts.get(pair) or uid_text(*pair) for pair in pairs]
            writer.write_table(pa.table([texts], schema=schema))


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _identity(
    request: AuditRequest, published: PublishedList, downloads: Sequence[Download], cache: Path
) -> tuple[Identity, list[str]]:
    """What makes samples the same, and notes on it."""
    without = [download.name for download in downloads if not _has_uids(download, cache)]
    if request.identity == "uid" or (request.identity == "auto" and published.uid and not without):
        if not published.uid:
            raise UsageError("--identity uid: the list has no column uid. Leave the option out.")
        return "uid", []
    if not published.url and request.identity == "url":
        raise UsageError("--identity url: the list has no column url. Leave the option out.")
    if not published.url:
        raise AuditError(
            f"--download {without[0]}: neither its parquets nor its tars have uids, and the list has no url to find "
            "its samples by. Download with img2dataset's --save_additional_columns '[\"uid\"]'."
        )
    why = f"{', '.join(without)} has no uids" if published.uid and without else "the list has no uids"
    asked = request.identity == "url"
    note = f"Samples are known by the MD5 of their url{'' if asked else f', since {why}'}: equal urls are one sample."
    return "url", [note]


def _has_uids(download: Download, cache: Path) -> bool:
    """Whether the first readable shards tell uids."""
    told = set()
    for shard in download.shards[:_LOOKED_AT]:
        with shard.on_disk(cache / "fetched") as local:
            told |= {_parquet_has_uid(local), _tar_has_uid(local)}
    return True in told or False not in told


def _parquet_has_uid(shard: DownloadedShard) -> bool | None:
    """None for one that is not there, cannot be read, or has no row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if shard.parquet is None:
            return None
        with pq.ParquetFile(shard.parquet) as parquet:
            if "uid" not in parquet.schema_arrow.names:
                return False
            first = next(parquet.iter_batches(1 << 14, columns=["uid"]), None)
            return None if first is None or not len(first) else first.column(0).null_count < len(first)
    except (pa.ArrowException, OSError, UnicodeEncodeError):
        return None


def _tar_has_uid(shard: DownloadedShard) -> bool | None:
    """None for one that is not there, cannot be read, or has no sample."""
    try:
        index = index_shard(shard.tar) if shard.tar else None
        if index is None or not index.num_samples:
            return None
        if "json" not in index.members(0):
            return False
        with open(index.path, "rb") as stream:
            return json_uid(read_member(stream.fileno(), index.members(0)["json"])) is not None
    except (OSError, ValueError, ShardError):
        return None
