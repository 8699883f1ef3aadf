"""`--deep`: every picture of a download decoded and hashed, into a parquet a shard, which a later run takes over."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from neuclip_scale.audit.errors import AuditError
from neuclip_scale.audit.looks import Look, look_of
from neuclip_scale.audit.sample_json import read_record, sayable
from neuclip_scale.data.decoding import ImageError, decode_image
from neuclip_scale.data.shards import MemberSpan, ShardError, ShardIndex, index_shard, read_member
from neuclip_scale.files import atomic_file
from neuclip_scale.queries.uids import normal_uid
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.images import IMAGE_EXTENSIONS
from neuclip_scale.reshard.sidecar import read_sidecar
from neuclip_scale.reshard.workers import available_cores, ordered, worker_pool

MAX_PIXELS = 50_000_000
"""Larger pictures are refused before they are decoded, as by training unless `data.max_image_pixels` says otherwise."""

_MAX_FAULT = 300
_FORMAT = 1
_META = b"neuclip_scale.audit.pictures"
_TEXTS = ("uid", "key", "shard", "fault", "sha256", "tar_sha256", "pixel_hash")
_NUMBERS = ("position", "num_bytes", "original_width", "original_height", "width", "height", "phash", "dhash")
_COLOURS = ("red", "green", "blue")


@dataclass(frozen=True)
class PictureShard:
    """What was found in one shard, beside the rows of its samples."""

    name: str
    """`00000`, without `.tar`."""
    num_samples: int
    num_undecodable: int
    num_bytes: int
    """Of the tar."""
    fault: str = ""
    """What is wrong with the tar itself: cut off, no tar, not readable."""


@dataclass(frozen=True)
class DeepScan:
    """All shards of a download; the rows are in `files`."""

    files: tuple[Path, ...]
    """A parquet a shard. One row a sample: uid, key, shard, position in the shard, decodes, fault (null where there is
    none), sha256 and original_width, original_height as the sample's json tells them of the original bytes, num_bytes
    and tar_sha256 of the picture as it stands in the tar, and what `looks.Look` has (null where nothing decodes)."""
    shards: tuple[PictureShard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_undecodable(self) -> int:
        return sum(shard.num_undecodable for shard in self.shards)


class _Job(NamedTuple):
    name: str
    tar: Path
    target: Path


Progress = Callable[[PictureShard], None]


def deep_scan(folder: Path, output: Path, num_workers: int = 0, progress: Progress | None = None) -> DeepScan:
    """Decode and hash the pictures of every `*.tar` in `folder`, into one parquet a shard in `output`.

    Shards that an earlier run finished, and that have not changed, are taken over; what it left of others is removed.
    `num_workers` 0 takes every core. A shard or picture that cannot be read is a fault in the result. Raises
    `AuditError` for a folder without tars, and when results cannot be written or a worker is killed.
    """
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not tars:
        raise AuditError(f"--deep: {folder} holds no .tar. Give the folder of the shards themselves.")
    return scan_pictures([(path.stem, path) for path in tars], output, num_workers, progress)


def scan_pictures(
    tars: Sequence[tuple[str, Path]], output: Path, num_workers: int = 0, progress: Progress | None = None
) -> DeepScan:
    """`deep_scan` of tars (name, path) that lie anywhere; the names differ."""
    jobs = [_Job(name, path, output / f"{_file_name(name)}.parquet") for name, path in tars]
    files = tuple(job.target for job in jobs)
    if len(set(files)) < len(files):
        raise AuditError("--deep: two shards have one name. Give each download its own folder of results.")
    done = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        _remove_others(output, files)
        for shard in _scanned(jobs, num_workers or available_cores()):
            done[shard.name] = shard
            if progress is not None:
                progress(shard)
    except ReshardError as error:  # what the pool says of a killed worker
        raise AuditError(f"--deep: {error}") from error
    except OSError as error:
        raise AuditError(
            f"--deep: {error.filename or output}: {error.strerror}. Mend that and run this again: it goes on."
        ) from error
    return DeepScan(files, tuple(done[name] for name, _ in tars))


def _file_name(name: str) -> str:
    return name.replace(os.sep, "_").lstrip("_")


def _remove_others(output: Path, files: Sequence[Path]) -> None:
    """Results of shards that are no longer there would count as pictures of this download."""
    for path in set(output.glob("*.parquet")) - set(files):
        if _saved(path) is not None:
            path.unlink()


def _scanned(jobs: Sequence[_Job], num_workers: int) -> Iterator[PictureShard]:
    """First the shards of an earlier run, then the others as they are done."""
    rest = []
    for job in jobs:
        saved = _saved(job.target)
        is_read = saved is not None and (saved["shard"]["num_samples"] or not saved["shard"]["fault"])
        if saved is not None and is_read and saved["fingerprint"] == _fingerprint(job.tar):
            yield PictureShard(**saved["shard"])
        else:
            rest.append(job)
    if rest:
        num_workers = min(num_workers, len(rest))
        with worker_pool(num_workers) as pool:
            yield from ordered(pool, _scan, rest, ahead=2 * num_workers)


def _scan(job: _Job) -> PictureShard:
    name, tar, target = job
    fingerprint = _fingerprint(tar)
    rows, num_bytes, fault = [], 0, ""
    try:
        num_bytes = tar.stat().st_size
        index = index_shard(tar)
        fault = index.fault
        rows = list(_rows(name, tar, index))
    except OSError as error:
        fault = error.strerror or str(error)
    shard = PictureShard(name, len(rows), sum(not row["decodes"] for row in rows), num_bytes, fault)
    _write(rows, target, {"format": _FORMAT, "fingerprint": fingerprint, "shard": asdict(shard)})
    return shard


def _fingerprint(tar: Path) -> str:
    """Changes when the tar or the parquet beside it does."""
    found: list[list[Any]] = []
    for path in (tar, tar.with_suffix(".parquet")):
        try:
            status = path.stat()
        except OSError:
            found.append([])
        else:
            found.append([str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return hashlib.blake2b(json.dumps(found).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _rows(name: str, tar: Path, index: ShardIndex) -> Iterator[dict[str, Any]]:
    """One row a sample; a picture that cannot be read is a row with a fault."""
    # A parquet that cannot be read tells no uids: its faults are told by who reads what was attempted.
    uids = read_sidecar(tar, index.keys, None).uids or [None] * index.num_samples
    with open(tar, "rb", buffering=0) as stream:
        for position, key in enumerate(index.keys):
            members = index.members(position)
            row: dict[str, Any] = {"key": sayable(key), "shard": sayable(name), "position": position, "fault": None}
            row |= _told(stream.fileno(), members.get("json"))
            row["uid"] = normal_uid(row.get("uid") or uids[position] or row["key"])
            span = next((members[kind] for kind in IMAGE_EXTENSIONS if kind in members), None)
            row |= _seen(stream.fileno(), span)
            row["fault"] = None if row["fault"] is None else _one_line(row["fault"])
            yield row


def _told(descriptor: int, span: MemberSpan | None) -> dict[str, Any]:
    """What the sample's json says of the original picture."""
    if span is None:
        return {}
    try:
        return {name: value for name, value in read_record(descriptor, span)._asdict().items() if name != "url"}
    except ValueError as error:
        return {"fault": f"its json cannot be read ({error})"}


def _seen(descriptor: int, span: MemberSpan | None) -> dict[str, Any]:
    """What the picture itself shows; `fault` only where it has one."""
    if span is None:
        return {"decodes": False, "fault": f"it has no picture ({', '.join(IMAGE_EXTENSIONS)})"}
    seen: dict[str, Any] = {"decodes": False, "num_bytes": span.size}
    try:
        data = read_member(descriptor, span)
        seen["tar_sha256"] = hashlib.sha256(data).hexdigest()
        look = look_of(decode_image(data, MAX_PIXELS))
    except (ImageError, ShardError) as error:
        return {**seen, "fault": str(error)}
    except MemoryError:
        return {**seen, "fault": "there was not enough memory to decode it"}
    return {**seen, **asdict(look), "decodes": True}


def _one_line(text: str) -> str:
    return " ".join(sayable(text).split())[:_MAX_FAULT]


def _write(rows: Sequence[dict[str, Any]], target: Path, meta: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {**dict.fromkeys(_TEXTS, pa.string()), "decodes": pa.bool_(), **dict.fromkeys(_NUMBERS, pa.int64())}
    schema = pa.schema([*kinds.items(), *((name, pa.int16()) for name in _COLOURS)], {_META: json.dumps(meta)})
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    with atomic_file(target) as stream:
        pq.write_table(table, stream)


def _saved(path: Path) -> dict[str, Any] | None:
    """What `_write` noted in a parquet; None for one that is not there, not whole or of another kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = json.loads((pq.read_schema(path).metadata or {})[_META])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return meta if meta.get("format") == _FORMAT else None


assert {field.name for field in fields(Look)} <= {*_TEXTS, *_NUMBERS, *_COLOURS}
