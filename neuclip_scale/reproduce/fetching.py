"""Stage `download`: the listed pictures by img2dataset, in its own environment."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from neuclip_scale.downloading import (
    DownloadingError,
    img2dataset_command,
    img2dataset_environment,
    img2dataset_variables,
)
from neuclip_scale.reproduce.demo_server import serve
from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.listing import count_rows, list_path
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.stages import Command, Stage
from neuclip_scale.run_folder import read_object

_KEPT = ("uid", "clip_b32_similarity_score", "clip_l14_similarity_score")
"""Columns of the list that go into each sample's json, where it has them."""


def download_stage(request: Request) -> Stage:
    """img2dataset goes on with the shards it has not finished; a network that is down is a fault of every picture."""
    settings, places = request.experiment.download, request.places
    # What decides which pictures there are, not how fast they come.
    chosen = {key: value for key, value in vars(settings).items() if key not in ("processes", "threads", "timeout")}
    shown = " ".join(("img2dataset", *_options(request, _KEPT)))
    return Stage(
        "download", ("list",), chosen, do=lambda log: _download(request, log),
        read=lambda: _totals(request), produces=(places.download,), told=(shown,),
    )  # fmt: skip


def _options(request: Request, columns: tuple[str, ...]) -> list[str]:
    settings = request.experiment.download
    values = {
        "url_list": list_path(request), "input_format": "parquet", "url_col": "url",
        "caption_col": "text", "output_folder": request.places.download, "output_format": "webdataset",
        "image_size": settings.image_size,
        "resize_mode": settings.resize_mode, "resize_only_if_bigger": settings.only_if_bigger,
        "skip_reencode": settings.resize_mode == "no", "number_sample_per_shard": settings.shard_size,
        "processes_count": settings.processes, "thread_count": settings.threads, "retries": settings.retries,
        "timeout": settings.timeout, "compute_hash": "sha256", "enable_wandb": False, "oom_shard_count": 8,
        "save_additional_columns": json.dumps([name for name in _KEPT if name in columns], separators=(",", ":")),
    }  # fmt: skip
    if settings.blur_faces and ("face_bboxes" in columns or columns is _KEPT):
        values["bbox_col"] = "face_bboxes"
    return [f"--{name}={value}" for name, value in values.items()]


def _download(request: Request, log: Path) -> None:
    import pyarrow.parquet as pq

    path = list_path(request)
    first = next(iter(sorted(path.rglob("*.parquet")))) if path.is_dir() else path
    try:
        python = img2dataset_environment()
    except DownloadingError as error:
        raise ReproduceError(str(error)) from error
    options = _options(request, tuple(pq.read_schema(first).names))
    _remove_torn(request.places.download)
    variables = img2dataset_variables()
    if request.experiment.list.kind != "demo":
        Command((*img2dataset_command(python), *options), environment=variables).run(log)
        return
    here = {**variables, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    with serve(request.places.list_folder):
        Command((*img2dataset_command(python), *options), environment=here).run(log)


def _remove_torn(folder: Path) -> None:
    """img2dataset takes a shard for done where there is a `_stats.json`, also one that a kill has cut off."""
    for path in folder.rglob("*_stats.json"):
        if not read_object(path):
            path.unlink()


def _totals(request: Request) -> dict[str, Any]:
    """What img2dataset counted; raises `ReproduceError` where nothing came, or not all of the list was tried."""
    folder, listed = request.places.download, count_rows(list_path(request))
    counts: Counter[str] = Counter()
    for path in sorted(folder.rglob("*_stats.json")):
        found = read_object(path)
        counts.update({"tried": found.get("count", 0), "downloaded": found.get("successes", 0)})
        counts.update({name: found.get(name, 0) for name in ("failed_to_download", "failed_to_resize")})
    if counts["tried"] < listed:
        raise ReproduceError(
            f"{folder}: {counts['tried']:,} of the {listed:,} listed pictures were tried: shards of img2dataset's "
            "failed, for want of disk or memory. Look into the stage's log, mend that, and give the same command again."
        )
    if not counts["downloaded"]:
        raise ReproduceError(f"{folder}: not one picture came. Look into the stage's log, and remove that folder.")
    return dict(counts)
