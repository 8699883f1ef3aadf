"""Reading one shard of a download: what its parquet says was attempted, and what its tar really holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuclip_scale.audit.addresses import host_of
from neuclip_scale.audit.downloads import MAX_STATS_BYTES, DownloadedShard, File
from neuclip_scale.audit.identity import Identity, url_uid
from neuclip_scale.audit.reasons import reason_of
from neuclip_scale.audit.sample_json import Record, read_record, sayable
from neuclip_scale.data.shards import MAX_MEMBER_BYTES, ShardIndex, index_shard
from neuclip_scale.data.shards.index import HOLDS_NO_SAMPLE
from neuclip_scale.files import atomic_file, write_json
from neuclip_scale.queries.uids import normal_uid
from neuclip_scale.reshard.images import IMAGE_EXTENSIONS
from neuclip_scale.untrusted_text import printable

ATTEMPT_COLUMNS = ("uid", "url", "key", "status", "error_message", "sha256")
CONTENT_COLUMNS = ("uid", "own", "key", "fault", "sha256")
FORMAT = 3
"""Of what is kept of a shard; raise it whenever the same files would give other rows."""

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ScannedShard:
    """What was found in one shard, beside the rows themselves."""

    name: str
    num_attempted: int | None = None
    """Rows of the parquet; None without a readable one."""
    num_samples: int | None = None
    """Samples in the tar; None without a tar."""
    num_corrupt: int = 0
    """Of these, those that cannot be used."""
    num_by_key: int = 0
    """Of these, those whose json and parquet tell no identity: they are known by their keys."""
    tar_fault: str = ""
    """What is wrong with the tar: it ends early, holds no sample, ..."""
    parquet_fault: str = ""
    started: str = ""
    """Day the download of the shard began, as 2026-11-25, where `_stats.json` tells it."""
    num_bytes: int = 0
    """Of the tar."""


@dataclass(frozen=True)
class ScanJob:
    """Reads shards of a download into a folder of parquet files, `attempts/` and `contents/`; can be pickled."""

    folder: Path
    identity: Identity

    def __call__(self, shard: DownloadedShard) -> ScannedShard:
        """Read one shard, or take over what an earlier run has read of the same files.

        Faults of the shard are told in the result. Raises OSError when the results cannot be written.
        """
        stem = self._stem(shard)
        done = self.folder / "shards" / f"{stem}.json"
        if done.exists():
            return ScannedShard(**json.loads(done.read_bytes()))
        with shard.on_disk(self.folder / "fetched") as local:
            scanned = self._read(local, stem)
        write_json(done, asdict(scanned))
        return scanned

    def _read(self, shard: DownloadedShard, stem: str) -> ScannedShard:
        uids = _ParquetUids(shard.parquet, self.identity)
        num_attempted, parquet_fault = self._read_attempts(shard, stem)
        num_samples, num_corrupt, num_by_key, tar_fault = None, 0, 0, ""
        if shard.tar:
            num_samples, num_corrupt, num_by_key, tar_fault = self._read_contents(shard, stem, uids)
        return ScannedShard(
            shard.name,
            num_attempted,
            num_samples,
            num_corrupt,
            num_by_key,
            tar_fault,
            parquet_fault,
            _day(shard.stats),
            Path(shard.tar).stat().st_size if shard.tar else 0,
        )

    def files(self, kind: str, shards: Sequence[DownloadedShard]) -> list[Path]:
        """The files that reading `shards` has left, of kind `attempts` or `contents`."""
        paths = (self.folder / kind / f"{self._stem(shard)}.parquet" for shard in shards)
        return [path for path in paths if path.exists()]

    def _stem(self, shard: DownloadedShard) -> str:
        """Name of what is kept of a shard: another for other files, another identity, and another way of reading."""
        return f"{_file_name(shard.name)}-{shard.fingerprint}-{self.identity}{FORMAT}"

    def _read_attempts(self, shard: DownloadedShard, stem: str) -> tuple[int | None, str]:
        import pyarrow as pa

        if shard.parquet is None:
            return None, ""
        try:
            return self._write(
                "attempts", stem, _attempts(shard, self.identity), (*ATTEMPT_COLUMNS, "host", "reason")
            ), ""
        except (pa.ArrowException, UnreadableError) as error:
            return None, printable(f"{Path(shard.parquet).name}: {str(error).splitlines()[0]}")

    def _read_contents(self, shard: DownloadedShard, stem: str, uids: _ParquetUids) -> tuple[int, int, int, str]:
        assert shard.tar is not None
        try:
            index = index_shard(shard.tar)
            rows = list(_samples(shard.tar, index, self.identity, uids))
        except OSError as error:
            return 0, 0, 0, error.strerror or str(error)
        columns: dict[str, list[Any]] = {
            name: [row[place] for row in rows] for place, name in enumerate(CONTENT_COLUMNS)
        }
        columns |= {"shard": [shard.name] * len(rows), "position": list(range(len(rows)))}
        self._write("contents", stem, iter([columns]), CONTENT_COLUMNS)
        fault = "" if index.fault == HOLDS_NO_SAMPLE else index.fault  # so is the tar of a shard of which nothing came
        return len(rows), sum(each is not None for each in columns["fault"]), sum(row[-1] for row in rows), fault

    def _write(self, kind: str, stem: str, parts: Iterator[dict[str, list[Any]]], texts: Sequence[str]) -> int:
        """Write rows; returns how many. Nothing stays of them when reading fails."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([*((name, pa.string()) for name in (*texts, "shard")), ("position", pa.int64())])
        path, num_rows = self.folder / kind / f"{stem}.parquet", 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream, pq.ParquetWriter(stream, schema) as writer:
            for part in parts:
                table = pa.table(part, schema=schema)
                writer.write_table(table)
                num_rows += table.num_rows
        return num_rows


class UnreadableError(ValueError):
    """A parquet that says nothing of downloads."""


def _attempts(shard: DownloadedShard, identity: Identity) -> Iterator[dict[str, list[Any]]]:
    """Rows of img2dataset's parquet. Raises `UnreadableError` and pyarrow's errors."""
    position = 0
    for part in _columns(shard.parquet, ATTEMPT_COLUMNS, needed=(identity, "key", "status")):
        count = len(part["key"])
        part["uid"] = _uids(part, identity)
        part["host"] = list(map(host_of, part["url"]))
        part["reason"] = list(map(reason_of, part["status"], part["error_message"]))
        part |= {"shard": [shard.name] * count, "position": list(range(position, position + count))}
        position += count
        yield part


def _uids(part: dict[str, list[Any]], identity: Identity) -> list[str | None]:
    if identity == "url":
        return [None if url is None else url_uid(url) for url in part["url"]]
    return [None if uid is None else normal_uid(uid) for uid in part["uid"]]


def _columns(path: File | None, names: Sequence[str], needed: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Columns as lists of texts, None where one is absent or null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
    except (OSError, UnicodeEncodeError) as error:  # pyarrow takes no name that is not UTF-8
        raise UnreadableError(str(error)) from error
    with parquet:
        there = parquet.schema_arrow.names
        absent = [name for name in needed if name not in there]
        if absent:
            raise UnreadableError(f"has no column {absent[0]}, but {', '.join(there[:20])}")
        batches = parquet.iter_batches(_ROWS_AT_ONCE, columns=[name for name in names if name in there])
        while (batch := _next(batches)) is not None:
            yield {
                name: _texts(batch.column(name)) if name in batch.schema.names else pa.nulls(len(batch)).to_pylist()
                for name in names
            }


def _next(batches: Iterator[Any]) -> Any | None:
    """The next batch; a damaged page is an OSError to pyarrow, which here is one of the parquet and not of a disk."""
    try:
        return next(batches, None)
    except OSError as error:
        raise UnreadableError(str(error)) from error


def _texts(column: Any) -> list[str | None]:
    """A column as texts; bytes that are no UTF-8 are replaced, since engines refuse them."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column.validate(full=True)
            found: list[str | None] = column.to_pylist()
            return found
        except pa.ArrowInvalid:
            column = column.cast(pa.large_binary())
    values = column.to_pylist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else _text(value) for value in values]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


class _ParquetUids:
    """Uids by key, for samples whose json tells none; read when first asked for."""

    def __init__(self, path: File | None, identity: Identity) -> None:
        self._path = path
        self._identity: Identity = identity
        self._by_key: dict[str, tuple[str | None, str | None]] | None = None

    def of(self, key: str) -> str | None:
        """By the identity of the audit."""
        return self._read().get(key, (None, None))[0]

    def own_of(self, key: str) -> str | None:
        """By the column uid."""
        return self._read().get(key, (None, None))[1]

    def _read(self) -> dict[str, tuple[str | None, str | None]]:
        import pyarrow as pa

        if self._by_key is None:
            self._by_key = {}
            try:
                parts = _columns(self._path, ("key", "uid", "url"), ("key", self._identity)) if self._path else ()
                for part in parts:
                    pairs = zip(_uids(part, self._identity), part["uid"], strict=True)
                    self._by_key.update(zip(part["key"], pairs, strict=True))  # type: ignore[arg-type]
            except (pa.ArrowException, UnreadableError):
                pass  # told once, by reading the attempts
        return self._by_key


Sample = tuple[str, str, str, str | None, str | None, bool]
"""Uid, own uid, key, fault, sha256 of the original bytes, whether only the key tells which sample it is."""


def _samples(path: File, index: ShardIndex, identity: Identity, uids: _ParquetUids) -> Iterator[Sample]:
    extensions = np.array([name in IMAGE_EXTENSIONS for name in index.extensions], dtype=bool)
    with open(path, "rb", buffering=0) as stream:
        for position, key in enumerate(index.keys):
            rows = slice(int(index.starts[position]), int(index.starts[position + 1]))
            fault, record = _size_fault(index.member_size[rows], extensions[index.member_extension[rows]]), Record()
            span = index.members(position).get("json")
            if span is not None:
                try:
                    record = read_record(stream.fileno(), span)
                except ValueError as error:
                    fault = f"its json cannot be read ({error})"
            told = _identity_of(record, identity) or uids.of(key)
            uid = sayable(told or key)
            own = uid if identity == "uid" else record.uid or sayable(uids.own_of(key) or key)
            yield uid, own, sayable(key), fault and sayable(fault), record.sha256, not told


def _identity_of(record: Record, identity: Identity) -> str | None:
    if identity == "url":
        return None if record.url is None else url_uid(record.url)
    return None if record.uid is None else normal_uid(record.uid)


def _size_fault(sizes: np.ndarray, pictures: np.ndarray) -> str | None:
    if (sizes > MAX_MEMBER_BYTES).any():
        return f"a member of over {MAX_MEMBER_BYTES} bytes"
    if not pictures.any():
        return "it has no picture"
    return None if sizes[pictures].all() else "its picture is empty"


def _day(path: File | None) -> str:
    """The day a shard's download began; empty where its `_stats.json` does not tell."""
    from datetime import datetime, timezone

    try:
        if path is None or os.path.getsize(path) > MAX_STATS_BYTES:
            return ""
        value = json.loads(Path(path).read_bytes())["start_time"]
        return datetime.fromtimestamp(float(value), timezone.utc).strftime("%Y-%m-%d")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ""


def _file_name(name: str) -> str:
    return name.replace(os.sep, "_").lstrip("_")
