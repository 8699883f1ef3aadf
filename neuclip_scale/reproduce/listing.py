"""Stage `list`: the published list, made, fetched or given."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neuclip_scale.config import ConfigError
from neuclip_scale.hub import HubError, fetch_dataset
from neuclip_scale.reproduce.demo_list import LIST, write_demo_list
from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.stages import Stage, neuclip

METADATA = "metadata"
"""Folder of the parquets that make the list; no folder in it, for img2dataset looks into none."""
_ROWS_OF_A_FILE, _ROWS_AT_ONCE = 2_000_000, 1 << 16


def list_path(request: Request) -> Path:
    """A parquet, or a folder of them."""
    folder = request.places.list_folder
    if _kind(request) == "demo":
        return folder / LIST
    given = Path(request.list)
    return given if request.list and _is_ready(given) else folder / METADATA


def list_stage(request: Request) -> Stage:
    """The stage for this kind of list; raises `ConfigError` where a list that was given is not there."""
    source, path = request.experiment.list, list_path(request)
    kind = _kind(request)
    if kind == "demo":
        make = neuclip("demo-data", request.demo_data)
        return Stage(
            "list", (), {"kind": kind, "limit": source.limit}, do=lambda log: _make_demo(request, log),
            read=lambda: _count(path), produces=(path,),
            told=(f"{make.text}   # unless it is there", f"serve its pictures, and list them: {path}"),
        )  # fmt: skip
    if kind == "hub":
        files = [source.files]
        if "image_based" in request.experiment.filter:
            files.append(source.files.replace(".parquet", ".npz"))
        told = f"fetch {' '.join(files)} of {source.repository} from {os.environ.get('HF_ENDPOINT', 'the hub')}: {path}"
        return Stage(
            "list", (), {"kind": kind, "repository": source.repository, "files": files},
            do=lambda _: _fetch(source.repository, files, path), read=lambda: _count(path), produces=(path,),
            told=(told,),
        )  # fmt: skip
    same = path == Path(request.list)
    return Stage(
        "list", (), {"kind": kind, "list": _fingerprint(request.list)},
        do=None if same else lambda _: _convert(request.list, path), read=lambda: _count(path),
        produces=() if same else (path,), told=(f"{request.list} as it is" if same else f"write {path}",),
    )  # fmt: skip


def _kind(request: Request) -> str:
    """A list that is given takes the place of one that would be fetched."""
    return "file" if request.list else request.experiment.list.kind


def _parquets(path: Path) -> list[Path]:
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]


def _is_ready(path: Path) -> bool:
    """Whether a list has the columns that all stages use, by these names, and no folders within folders."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _parquets(path)
    if path.is_dir() and any(file.parent != path for file in files):
        return False
    try:
        return bool(files) and {"uid", "url", "text"} <= set(pq.read_schema(files[0]).names)
    except (OSError, pa.ArrowException):
        return False


def _fingerprint(given: str) -> str:
    """Of the names below `given`, sizes and times of the list's files: not of where they lie."""
    root = Path(given)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    try:
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise ConfigError("--list", given, f"cannot be read ({error.strerror})", "Give the published list.") from error
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def _make_demo(request: Request, log: Path) -> None:
    if not (request.demo_data / "train").is_dir():
        neuclip("demo-data", request.demo_data).run(log)
    write_demo_list(request.demo_data / "train", request.places.list_folder, request.experiment.list.limit)


def _fetch(repository: str, files: list[str], path: Path) -> None:
    """What the hub has goes to the folder beside `path`, and a link to each file into `path`."""
    fetched = path.with_name("hub")
    try:
        fetch_dataset(repository, fetched, files)
    except HubError as error:
        remedy = f"What came is kept; or fetch it elsewhere into {fetched}, or give it as --list."
        raise ReproduceError(f"{error}. {remedy}") from error
    path.mkdir(parents=True, exist_ok=True)
    for pattern in files:
        for file in sorted(fetched.glob(pattern)):
            link = path / "-".join(file.relative_to(fetched).parts)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(file, path))


def _convert(given: str, path: Path) -> None:
    """A list in text form, or with other names, as parquets with uid, url and text beside their other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from neuclip_scale.audit.errors import AuditError
    from neuclip_scale.audit.identity import url_uid
    from neuclip_scale.audit.published import find_list
    from neuclip_scale.files import atomic_file

    try:
        found = find_list(given, path.parent / "given")
    except AuditError as error:
        raise ReproduceError(str(error).replace("--manifest", "--list")) from error
    if not found.url or not found.text:
        raise ReproduceError(
            f"--list {given}: needs columns url and text, has {', '.join(found.columns)}. Rename them."
        )
    names = {found.url: "url", found.text: "text", found.uid: "uid"}
    path.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(_tables(found.files)):
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
        if not found.uid:
            uids = [url_uid(url or "") for url in table["url"].to_pylist()]
            table = table.append_column("uid", pa.array(uids, pa.string()))
        with atomic_file(path / f"{number:05d}.parquet") as stream:
            pq.write_table(table, stream)


def _tables(files: Sequence[Path]) -> Iterator[Any]:
    """Tables of some million rows, which img2dataset reads whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        batches, rows = [], 0
        for batch in pq.ParquetFile(file).iter_batches(min(_ROWS_AT_ONCE, _ROWS_OF_A_FILE)):
            batches.append(batch)
            rows += batch.num_rows
            if rows >= _ROWS_OF_A_FILE:
                yield pa.Table.from_batches(batches)
                batches, rows = [], 0
        if rows:
            yield pa.Table.from_batches(batches)


def count_rows(path: Path) -> int:
    """Rows of a list by its files' footers; raises `ReproduceError` for one that is cut off or empty."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in _parquets(path))
    except (OSError, pa.ArrowException) as error:
        raise ReproduceError(f"{path}: is no whole list ({error}). Fetch it again.") from error
    if not rows:
        raise ReproduceError(f"{path}: lists nothing. Give the published list.")
    return rows


def _count(path: Path) -> dict[str, Any]:
    return {"listed": count_rows(path)}
