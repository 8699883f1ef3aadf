"""The published list: parquet with a `uid` or a `url`, or a table in text form as CC3M's and CC12M's."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from neuclip_scale.audit.downloads import File, below, fingerprint_of
from neuclip_scale.audit.errors import AuditError
from neuclip_scale.audit.identity import LISTED_UID, Identity, url_uids
from neuclip_scale.data.shards import storage
from neuclip_scale.data.shards.storage import StorageError
from neuclip_scale.files import atomic_file
from neuclip_scale.queries.engines import Engine
from neuclip_scale.queries.uids import normal_uids
from neuclip_scale.untrusted_text import printable

_TEXT_SUFFIXES = (".tsv", ".csv")
_ROWS_AT_ONCE = 1 << 16
_URL_NAMES = ("url", "URL", "image_url", "contentUrl")
_TEXT_NAMES = ("text", "TEXT", "caption", "captions")


@dataclass(frozen=True)
class PublishedList:
    """Where the list lies, and what its columns are called."""

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    uid: str
    """Name of the column with uids; empty where there is none."""
    url: str
    text: str
    fingerprint: str
    """Of names, sizes and times of the files."""

    def table(self, engine: Engine, identity: Identity) -> Any:
        """An Ibis table with `uid`, normal, and `url` and `text` where they are known, beside all other columns.

        Where urls tell samples apart `uid` is made of them, and the list's own, if it has any, is `LISTED_UID`.
        """
        # A column without fractions or with nulls is often written with another type.
        table = engine.parquet(self.files, types_differ=len(self.files) > 1)
        names = {self.uid: "uid", self.url: "url", self.text: "text"}
        table = table.rename({new: old for old, new in names.items() if old and old != new})
        texts = {name: table[name].cast("string") for name in ("url", "text") if name in table.columns}
        table = table.mutate(**texts)
        if identity == "uid":
            return table.mutate(uid=normal_uids(table.uid.cast("string")))
        own = {LISTED_UID: table.uid.cast("string")} if self.uid else {}
        return table.mutate(uid=url_uids(table.url), **own)


def one_row_each(table: Any) -> Any:
    """Of rows with one uid the first in the order of all columns: a row of the list, and the same on any engine."""
    import ibis

    sortable = [name for name, kind in table.schema().items() if kind.is_primitive() and name != "uid"]
    place = ibis.row_number().over(group_by="uid", order_by=sortable or ["uid"])
    numbered = table.mutate(neuclip_place=place)
    return numbered.filter(numbered.neuclip_place == 0).drop("neuclip_place")


def find_list(text: str, scratch: Path) -> PublishedList:
    """The list at a file, folder or pattern; one in text form is first written as parquet into `scratch`.

    Raises `AuditError` for a file that cannot be read to its end or that has neither uids nor urls.
    """
    found = _find(text)
    if not found:
        raise AuditError(f"--manifest {text}: no parquet and no .tsv there. Give the published list.")
    try:
        stamps = [fingerprint_of(file) for file in found]
        fingerprint = hashlib.blake2b(json.dumps(stamps).encode(), digest_size=8).hexdigest()
        files = [_on_disk(file, scratch / f"list-{fingerprint}", place) for place, file in enumerate(found)]
    except (OSError, StorageError) as error:
        raise AuditError(f"--manifest {text}: {error}") from error
    if any(file.suffix in _TEXT_SUFFIXES for file in files):
        target = scratch / f"list-{fingerprint}.parquet"
        if not target.exists():
            scratch.mkdir(parents=True, exist_ok=True)
            _convert(files, target)
        files = [target]
    columns = _columns(files)
    uid, url, caption = (_first(names, columns) for names in (("uid",), _URL_NAMES, _TEXT_NAMES))
    if not uid and not url:
        raise AuditError(f"--manifest {text}: has neither a column uid nor url, but {', '.join(columns[:20])}.")
    return PublishedList(tuple(files), columns, uid, url, caption, fingerprint)


def _first(names: tuple[str, ...], columns: tuple[str, ...]) -> str:
    return next((name for name in names if name in columns), "")


def _find(text: str) -> list[File]:
    """Files of the list, sorted; raises `AuditError`."""
    suffixes = (".parquet", *_TEXT_SUFFIXES)
    if not storage.is_remote(text):
        path = Path(text)
        if path.is_dir():
            found = [sorted(path.rglob(f"*{suffix}")) for suffix in suffixes]
            return list(next((files for files in found if files), []))
        return [path] if path.is_file() else sorted(map(Path, glob.glob(text, recursive=True)))
    if text.partition("?")[0].endswith(suffixes) and "*" not in text:
        return [text]
    try:
        return list(storage.remote_matches(text if "*" in text else below(text, "*.parquet")))
    except StorageError as error:
        raise AuditError(f"--manifest {text}: {error}") from error


def _on_disk(file: File, folder: Path, place: int) -> Path:
    """The file itself, or a copy of a remote one, which is kept."""
    if isinstance(file, Path):
        return file
    target = folder / f"{place:06d}-{storage.base_name(file)}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{target.name}.tmp"
        storage.fetch(file, partial)
        partial.rename(target)
    return target


def _columns(files: list[Path]) -> tuple[str, ...]:
    """Columns that the files must all have; a list with a file that is cut off would call its samples orphans."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first: tuple[str, ...] = ()
    for file in files:
        try:
            names = tuple(pq.read_schema(file).names)
        except (pa.ArrowException, OSError, UnicodeEncodeError) as error:
            reason = str(error).splitlines()[0]
            raise AuditError(
                f"--manifest: {printable(str(file))} is no whole parquet file ({reason}). Fetch it again."
            ) from error
        first = first or names
        if set(names) != set(first):
            odd = sorted(set(names) ^ set(first))
            raise AuditError(
                f"--manifest: {file} has other columns than {files[0]} ({', '.join(odd[:5])}). Give files of one list."
            )
    return first


def _convert(files: list[Path], target: Path) -> None:
    """Write tables in text form as one parquet of texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    with atomic_file(target) as stream:
        for file in files:
            for part in _text_rows(file):
                table = pa.table({name: pa.array(values, pa.string()) for name, values in part.items()})
                writer = writer or pq.ParquetWriter(stream, table.schema)
                if table.schema != writer.schema:
                    raise AuditError(f"--manifest: {file} has other columns than {files[0]}. Give files of one list.")
                writer.write_table(table)
        if writer is None:
            raise AuditError(f"--manifest: {files[0]} holds no row. Give the published list.")
        writer.close()


def _text_rows(path: Path) -> Iterator[dict[str, list[str]]]:
    """Columns of a table, some rows at a time. Where no first line names them they are told by their contents."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        rows = _split(stream, path)
        first = next(rows, None)
        if first is None:
            return
        has_names = any(name in first for name in (*_URL_NAMES, "uid"))
        names = first if has_names else _guess(first, path)
        block = [] if has_names else [first]
        for number, row in enumerate(rows, start=2):
            if len(row) != len(names):
                raise AuditError(f"--manifest: {path} line {number} has {len(row)} columns, not {len(names)}. Mend it.")
            block.append(row)
            if len(block) == _ROWS_AT_ONCE:
                yield dict(zip(names, map(list, zip(*block, strict=True)), strict=True))
                block = []
        if block:
            yield dict(zip(names, map(list, zip(*block, strict=True)), strict=True))


def _split(stream: IO[str], path: Path) -> Iterator[list[str]]:
    if path.suffix != ".csv":  # published .tsv quote nothing, and captions have quotation marks
        yield from (line.rstrip("\r\n").split("\t") for line in stream if line.strip())
        return
    csv.field_size_limit(1 << 24)
    reader = csv.reader(stream, strict=True)  # else a mark that is never closed makes one caption of all that follows
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        told = f"{path} line {reader.line_num}: {error}"
        raise AuditError(f"--manifest: {told}. Close every quotation mark, or write a .tsv, which has none.") from error


def _guess(first: list[str], path: Path) -> list[str]:
    """CC12M is url, caption; CC3M is caption, url."""
    places = [place for place, text in enumerate(first) if text.startswith(("http://", "https://")) and " " not in text]
    if len(places) != 1 or len(first) not in (1, 2):
        raise AuditError(f"--manifest: {path} has no first line that names its columns. Begin it with url<TAB>text.")
    return ["url" if place == places[0] else "text" for place in range(len(first))]
