"""From npm packages to a finished folder: fetch, name, draw, split, write; resumable, and done once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neuclip_scale.data.demo import npm, write
from neuclip_scale.data.demo.icons import IconSet, read_icon_set
from neuclip_scale.data.demo.names import Naming
from neuclip_scale.data.demo.rasterise import JPEG_QUALITY, default_workers, import_renderer, rasterise
from neuclip_scale.data.demo.selection import NEAR_DUPLICATE_RMS, Drawn, NamedIcon, Split, choose_icons, split
from neuclip_scale.data.demo.sources import HELD_OUT, SOURCES

CAVEAT = "These are icons and emoji, not photographs: scores on them say nothing about photographs."
_FORMAT = 1
_IN_PROGRESS = ".demo-data-in-progress.json"
_RESULT = "demo.json"

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


class DemoDataError(RuntimeError):
    """The folder cannot be built; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What decides the content (`image_size`, `num_held_out_names`, `num_concepts`) and how it is made."""

    out: Path
    cache: Path
    image_size: int = 64
    num_held_out_names: int = 500
    num_concepts: int = 0
    offline: bool = False
    workers: int = 0


@dataclass(frozen=True)
class DemoResult:
    """The content of demo.json, and whether the folder was complete before."""

    summary: dict[str, Any]
    was_there: bool
    num_shards_kept: int = 0


def build_demo(options: DemoOptions, report: Report) -> DemoResult:
    """Build `options.out`, or find it built. Raises `DemoDataError`, `FetchError`, `IconError`,
    `MissingRendererError`.

    The same options give the same bytes. A run that was interrupted is continued: shards that are whole are
    kept.
    """
    import_renderer()
    fingerprint = _fingerprint(options)
    finished = _finished_before(options.out, fingerprint)
    if finished is not None:
        return DemoResult(finished, was_there=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write.write_json(options.out / _IN_PROGRESS, {"fingerprint": fingerprint})
    report("fetching picture sets (npm)", 0, len(SOURCES))
    npm.fetch(options.cache, SOURCES, offline=options.offline)
    icon_sets = []
    for number, source in enumerate(SOURCES, start=1):
        icon_sets.append(read_icon_set(npm.package_folder(options.cache, source), source))
        report("fetching picture sets (npm)", number, len(SOURCES))
    chosen, left_out = choose_icons(icon_sets, Naming(icon_sets), options.num_concepts)
    drawn, malformed = _draw(chosen, options, report)
    num_names = len({item.name.concept for item in drawn})
    parts = split(drawn, min(options.num_held_out_names, num_names // 4))
    num_kept, num_classes = _write(parts, icon_sets, options, report)
    summary = _summary(parts, icon_sets, options, left_out, malformed, num_classes)
    summary |= {"fingerprint": fingerprint, "files": _file_sizes(options.out)}
    write.write_json(options.out / _RESULT, summary)
    (options.out / _IN_PROGRESS).unlink()
    return DemoResult(summary, was_there=False, num_shards_kept=num_kept)


def _finished_before(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The summary of a complete earlier run; None if there is work to do. Raises `DemoDataError` for foreign
    content.
    """
    if out.exists() and not out.is_dir():
        raise DemoDataError(f"{out} is a file: give the name of a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    for name in (_RESULT, _IN_PROGRESS):
        if (out / name).is_file():
            before = json.loads((out / name).read_bytes())
            if before.get("fingerprint") != fingerprint:
                raise DemoDataError(
                    f"{out} holds demo data made with other options or versions: give another folder, or delete it."
                )
            complete = name == _RESULT and _file_sizes(out) == before.get("files")
            return before if complete else None
    raise DemoDataError(f"{out} is not empty and not demo data: give another folder, nothing was written.")


def _draw(chosen: Sequence[NamedIcon], options: DemoOptions, report: Report) -> tuple[list[Drawn], dict[str, str]]:
    drawn: list[Drawn] = []
    malformed: dict[str, str] = {}
    pictures = rasterise([named.icon for named in chosen], options.image_size, options.workers or default_workers())
    for number, (named, picture) in enumerate(zip(chosen, pictures, strict=True), start=1):
        if isinstance(picture, str):
            malformed[f"{named.icon.source}:{named.icon.name}"] = picture
        else:
            drawn.append(Drawn(named.icon, named.name, named.uid, picture))
        report("drawing pictures", number, len(chosen))
    return drawn, malformed


def _write(parts: Split, icon_sets: Sequence[IconSet], options: DemoOptions, report: Report) -> tuple[int, int]:
    origin = {icon_set.source.name: icon_set for icon_set in icon_sets}
    num_kept = write.write_train_shards(
        options.out / "train",
        parts.train,
        origin,
        options.image_size,
        lambda done: report("writing shards", done, len(parts.train)),
    )
    evaluation = options.out / "eval"
    num_classes = write.write_zero_shot(evaluation / "zeroshot", parts.zero_shot, origin, options.image_size)
    write.write_retrieval(evaluation / "retrieval", parts.retrieval, origin, options.image_size)
    write.write_licences(options.out / "LICENSES.md", icon_sets)
    return num_kept, num_classes


def _summary(
    parts: Split,
    icon_sets: Sequence[IconSet],
    options: DemoOptions,
    left_out: dict[str, int],
    malformed: dict[str, str],
    num_classes: int,
) -> dict[str, Any]:
    trained = Counter(item.icon.source for item in parts.train)
    return {
        "caveat": CAVEAT,
        "image_size": options.image_size,
        "num_train": len(parts.train),
        "num_train_names": len({item.name.caption for item in parts.train}),
        "num_zero_shot": len(parts.zero_shot),
        "num_zero_shot_classes": num_classes,
        "num_retrieval": len(parts.retrieval),
        "held_out_vendor": HELD_OUT,
        "held_out_names": sorted(item.name.concept for item in parts.retrieval),
        "removed": {**left_out, **parts.removed, "malformed": len(malformed)},
        "malformed": malformed,
        "near_duplicate_rms": NEAR_DUPLICATE_RMS,
        "sources": [
            {
                "name": icon_set.source.name,
                "package": icon_set.source.package,
                "version": icon_set.source.version,
                "licence": icon_set.licence,
                "num_train": trained[icon_set.source.name],
            }
            for icon_set in icon_sets
        ],
    }


def _fingerprint(options: DemoOptions) -> str:
    """Hash of everything that decides the bytes."""
    values = [
        _FORMAT,
        options.image_size,
        options.num_held_out_names,
        options.num_concepts,
        [(source.name, source.version, source.icons_sha256, source.style) for source in SOURCES],
        [JPEG_QUALITY, NEAR_DUPLICATE_RMS, write.SHARD_SIZE, HELD_OUT],
        [version("resvg_py"), version("pillow")],
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _file_sizes(out: Path) -> dict[str, int]:
    """Relative path -> bytes of every file of the data itself."""
    return {
        path.relative_to(out).as_posix(): path.stat().st_size
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (_RESULT, _IN_PROGRESS) and path.suffix != ".tmp"
    }
