"""The demo's files: img2dataset's layout for training, clip_benchmark's webdataset layout for evaluation.

The same pictures always give the same bytes. img2dataset's statistics also hold times of day, which are left
out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neuclip_scale.data.demo.icons import IconSet
from neuclip_scale.data.demo.selection import Drawn
from neuclip_scale.data.shards import write_shard
from neuclip_scale.files import atomic_file, write_json, write_text

SHARD_SIZE = 1000
TEMPLATES = ("{c}",)
"""Training captions are bare names, so a bare name is the only prompt that resembles them."""

Origin = Mapping[str, IconSet]
"""Set name -> its package, version and licence."""


def write_train_shards(
    folder: Path, items: Sequence[Drawn], origin: Origin, image_size: int, report: Callable[[int], None]
) -> int:
    """Write NNNNN.tar, .parquet and _stats.json for every 1,000 items and return how many shards were already
    there.

    A shard counts as there when its statistics, written last, give the hash that its tar still has. `report`
    is called with the number of items finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_kept = 0
    for number, start in enumerate(range(0, len(items), SHARD_SIZE)):
        part = items[start : start + SHARD_SIZE]
        stem = folder / f"{number:05d}"
        if _is_finished(stem, len(part)):
            num_kept += 1
        else:
            keys = [f"{number:05d}{position:04d}" for position in range(len(part))]
            records = [_record(item, key, origin, image_size) for item, key in zip(part, keys, strict=True)]
            write_shard(
                stem.with_suffix(".tar"),
                (
                    {"__key__": key, "jpg": item.picture.jpeg, "txt": item.name.caption, "json": record}
                    for item, key, record in zip(part, keys, records, strict=True)
                ),
            )
            _write_parquet(stem.with_suffix(".parquet"), records)
            _write_statistics(stem, len(part))
        report(start + len(part))
    return num_kept


def write_zero_shot(folder: Path, items: Sequence[Drawn], origin: Origin, image_size: int) -> int:
    """Write a classification set (classnames.txt, templates, test/0.tar with .jpg and .cls); returns its
    classes.
    """
    classes = sorted({item.name.concept for item in items})
    index = {name: position for position, name in enumerate(classes)}
    write_text(folder / "classnames.txt", "\n".join(classes) + "\n")
    write_text(folder / "zeroshot_classification_templates.txt", "\n".join(TEMPLATES) + "\n")
    write_text(folder / "test" / "nshards.txt", "1\n")
    samples = (
        {
            "__key__": f"{position:06d}",
            "jpg": item.picture.jpeg,
            "cls": str(index[item.name.concept]),
            "json": _record(item, f"{position:06d}", origin, image_size),
        }
        for position, item in enumerate(items)
    )
    write_shard(folder / "test" / "0.tar", samples)
    return len(classes)


def write_retrieval(folder: Path, items: Sequence[Drawn], origin: Origin, image_size: int) -> None:
    """Write a retrieval set (dataset_type.txt, test/0.tar with .jpg and .txt, one caption a picture)."""
    write_text(folder / "dataset_type.txt", "retrieval\n")
    write_text(folder / "test" / "nshards.txt", "1\n")
    samples = (
        {
            "__key__": f"{position:06d}",
            "jpg": item.picture.jpeg,
            "txt": item.name.caption,
            "json": _record(item, f"{position:06d}", origin, image_size),
        }
        for position, item in enumerate(items)
    )
    write_shard(folder / "test" / "0.tar", samples)


def write_licences(path: Path, icon_sets: Iterable[IconSet]) -> None:
    """Write who drew what under which licence, as the sets' own info.json states it."""
    rows = [
        f"| {s.title} | {s.author} ({s.author_url}) | {s.licence} {s.licence_url} | "
        f"`{s.source.package}@{s.source.version}` |"
        for s in icon_sets
    ]
    text = (
        "# Licences of the pictures\n\n"
        "Each picture was drawn by the author below and comes under that set's licence; it was rasterised "
        "and stored as JPEG, and not altered otherwise. KEY.json names each picture's set and licence.\n\n"
        "| set | author | licence | npm package |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    write_text(path, text)


def _record(item: Drawn, key: str, origin: Origin, image_size: int) -> dict[str, Any]:
    """One row of the parquet and the KEY.json: img2dataset's columns, then where the picture comes from."""
    source = origin[item.icon.source].source
    return {
        "uid": item.uid,
        "key": key,
        "caption": item.name.caption,
        "url": f"npm:{source.package}@{source.version}#{item.icon.name}",
        "status": "success",
        "error_message": None,
        "width": image_size,
        "height": image_size,
        "original_width": image_size,
        "original_height": image_size,
        "sha256": hashlib.sha256(item.picture.jpeg).hexdigest(),
        "source": source.name,
        "icon": item.icon.name,
        "licence": origin[item.icon.source].licence,
    }


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = ("width", "height", "original_width", "original_height")
    schema = pa.schema([(name, pa.int32() if name in whole else pa.string()) for name in records[0]])
    with atomic_file(path) as stream:
        pq.write_table(pa.Table.from_pylist(records, schema=schema), stream)


def _write_statistics(stem: Path, count: int) -> None:
    statistics = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": count},
        "tar_sha256": _sha256(stem.with_suffix(".tar")),
    }
    write_json(stem.with_name(f"{stem.name}_stats.json"), statistics)


def _is_finished(stem: Path, count: int) -> bool:
    statistics = stem.with_name(f"{stem.name}_stats.json")
    tar, parquet = stem.with_suffix(".tar"), stem.with_suffix(".parquet")
    if not (statistics.is_file() and tar.is_file() and parquet.is_file()):
        return False
    try:
        said = json.loads(statistics.read_bytes())
    except ValueError:
        return False
    return bool(said.get("count") == count and said.get("tar_sha256") == _sha256(tar))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
