"""Stage `list`: the published list, made, fetched or given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from neuclip_scale.reproduce.demo_list import LIST, write_demo_list
from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.stages import Stage, neuclip


def list_path(request: Request) -> Path:
    """A parquet, or a folder of them."""
    source, folder = request.experiment.list, request.places.list_folder
    if source.kind == "hub":
        return folder / "metadata"
    given = Path(request.list)
    return given if source.kind == "file" and _is_ready(given) else folder / LIST


def list_stage(request: Request) -> Stage:
    """The stage for this kind of list."""
    source, places = request.experiment.list, request.places
    path = list_path(request)
    if source.kind == "demo":
        make = neuclip("demo-data", request.demo_data)
        return Stage(
            "list", (), {"kind": "demo", "demo_data": str(request.demo_data), "limit": source.limit},
            do=lambda log: _make_demo(request, log), read=lambda: _count(path), produces=(path,),
            told=(f"{make.text}   # unless it is there", f"serve its pictures, and list them: {path}"),
        )  # fmt: skip
    if source.kind == "hub":
        told = f"fetch {source.files} of {source.repository} from {os.environ.get('HF_ENDPOINT', 'the hub')}: {path}"
        return Stage(
            "list", (), {"kind": "hub", "repository": source.repository, "files": source.files},
            do=lambda _: _fetch(source.repository, source.files, places.list_folder / "metadata"),
            read=lambda: _count(path), produces=(path,), told=(told,),
        )  # fmt: skip
    same = path == Path(request.list)
    return Stage(
        "list", (), {"kind": "file", "list": request.list}, do=None if same else lambda _: _convert(request.list, path),
        read=lambda: _count(path), produces=(path,), told=(f"{request.list} as it is" if same else f"write {path}",),
    )  # fmt: skip


def _is_ready(path: Path) -> bool:
    """Whether a list has the columns that all stages use, by these names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    try:
        return bool(files) and {"uid", "url", "text"} <= set(pq.read_schema(files[0]).names)
    except (OSError, pa.ArrowException):
        return False


def _make_demo(request: Request, log: Path) -> None:
    if not (request.demo_data / "train").is_dir():
        neuclip("demo-data", request.demo_data).run(log)
    write_demo_list(request.demo_data / "train", request.places.list_folder, request.experiment.list.limit)


def _fetch(repository: str, files: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        endpoint = os.environ.get("HF_ENDPOINT") or None
        snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=files, endpoint=endpoint)
    except Exception as error:  # its error classes have changed their names and parents
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ReproduceError(
            f"{repository} could not be fetched ({type(error).__name__}: {reason}). What came is kept; or fetch it "
            f"elsewhere into {folder}."
        ) from error


def _convert(given: str, path: Path) -> None:
    """A list in text form, or with other names, as one parquet with uid, url and text beside its other columns."""
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
    writer = None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        for file in found.files:
            for batch in pq.ParquetFile(file).iter_batches():
                table = pa.Table.from_batches([batch])
                table = table.rename_columns([names.get(name, name) for name in table.column_names])
                if not found.uid:
                    uids = [url_uid(url or "") for url in table["url"].to_pylist()]
                    table = table.append_column("uid", pa.array(uids, pa.string()))
                writer = writer or pq.ParquetWriter(stream, table.schema)
                writer.write_table(table.cast(writer.schema))
        if writer is None:
            raise ReproduceError(f"--list {given}: holds no row. Give the published list.")
        writer.close()


def _count(path: Path) -> dict[str, Any]:
    """Rows by the files' footers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    try:
        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    except (OSError, pa.ArrowException) as error:
        raise ReproduceError(f"{path}: is no whole list ({error}). Fetch it again.") from error
    if not rows:
        raise ReproduceError(f"{path}: lists nothing. Give the published list.")
    return {"listed": rows}
