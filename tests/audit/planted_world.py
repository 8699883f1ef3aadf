"""Two downloads of one published list by real img2dataset, each with faults planted by uid."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from planted_certificates import make_certificates
from planted_list import (
    CLOSING,
    DEAD,
    DEAF,
    OUTAGE_SHARD,
    PLAIN_WEB,
    SHARD_SIZE,
    VANISHED,
    Fates,
    Sample,
    planted_fates,
    published_samples,
)
from planted_pictures import corrupt, jpeg, picture, placeholder, png, recompressed, resized, rewrapped
from planted_server import CUT, HANG, RESET, SILENT, TRICKLE, Answer, Ports, planted_server

from neuclip_scale.downloading import img2dataset_command, img2dataset_environment, img2dataset_variables

TIMEOUT = 7
"""Seconds: a busy machine answers within that."""
_DONE = "done"
MIN_SIDE, MAX_AREA, MAX_ASPECT = 48, 150_000, 3
OPTIONS = {
    "input_format": "parquet", "url_col": "url", "caption_col": "text", "output_format": "webdataset",
    "image_size": 192, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True,
    "number_sample_per_shard": SHARD_SIZE, "processes_count": 1, "thread_count": SHARD_SIZE, "timeout": TIMEOUT,
    "min_image_size": MIN_SIDE, "max_image_area": MAX_AREA, "max_aspect_ratio": MAX_ASPECT,
    "save_additional_columns": '["uid","clip_b32_similarity_score","language"]',
}  # fmt: skip

HTTP = {"http_401": 401, "http_404": 404, "http_410": 410, "http_403": 403, "http_429": 429, "http_500": 500}
ANSWERS = {
    **{name: Answer(b"sorry", status) for name, status in {**HTTP, "http_503": 503}.items()},
    "http_403_robots": Answer(b"no", 403, {"X-Robots-Tag": "noai"}),
    "html": Answer(b"<!DOCTYPE html><html><body>parked</body></html>", headers={"Content-Type": "text/html"}),
    "empty": Answer(b""),
    "timeout": Answer(conduct=HANG),
    "reset": Answer(conduct=RESET),
    "silent": Answer(conduct=SILENT),
}


@dataclass(frozen=True)
class Download:
    """A folder that img2dataset wrote, and what was planted for it."""

    folder: Path
    fates: Fates


@dataclass(frozen=True)
class PlantedWorld:
    """A published list with two downloads of it."""

    published: Path
    """The list, a parquet with DataComp's columns."""
    samples: list[Sample]
    """In the order of the list; `samples[SHARD_SIZE * s : SHARD_SIZE * (s + 1)]` are shard `s`."""
    first: Download
    second: Download

    @property
    def outage_shard(self) -> int:
        """Of the second download, where no name could be resolved."""
        return OUTAGE_SHARD


def load_world(folder: Path) -> PlantedWorld | None:
    """The world that `make_world` finished in `folder` before."""
    return _world(folder, published_samples()) if (folder / _DONE).exists() else None


def make_world(folder: Path) -> PlantedWorld:
    """Fetch both downloads into `folder`, at once; raises `DownloadingError` where img2dataset cannot be installed."""
    python = img2dataset_environment()
    world = _world(folder, published_samples())
    _write_list(world.samples, world.published)
    with ExitStack() as stack:
        context, trusted = make_certificates(folder / "certificates")
        processes = []
        for download, refused in ((world.first, DEAD), (world.second, CLOSING)):
            answers = {sample.url: _answer(sample, download.fates) for sample in world.samples}
            ports = stack.enter_context(planted_server(answers, context))
            resolver = folder / f"{download.folder.name}.json"
            resolver.write_text(json.dumps(_resolver(world.samples, download.fates, ports, refused)))
            processes.append(_start(python, world.published, download.folder, resolver, trusted))
            stack.callback(processes[-1].kill)
        for process in processes:
            log = process.communicate(timeout=300)[0]
            assert process.returncode == 0, log
    (folder / _DONE).touch()
    return world


def _world(folder: Path, samples: list[Sample]) -> PlantedWorld:
    first, second = planted_fates(samples)
    return PlantedWorld(
        folder / "published.parquet", samples, Download(folder / "first", first), Download(folder / "second", second)
    )


def _start(python: Path, published: Path, output: Path, resolver: Path, trusted: Path) -> subprocess.Popen[str]:
    command = [*img2dataset_command(python), f"--url_list={published}", f"--output_folder={output}"]
    return subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in OPTIONS.items())],
        env={
            **img2dataset_variables(),
            "PYTHONPATH": str(Path(__file__).parent / "planted_resolver"),
            "PLANTED_RESOLVER": str(resolver),
            "SSL_CERT_FILE": str(trusted),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _resolver(samples: list[Sample], fates: Fates, ports: Ports, refused: str) -> dict[str, object]:
    return {
        "ports": {"80": ports.http, "443": ports.https},
        "hosts": {refused: ports.closed, DEAF: ports.deaf, PLAIN_WEB: ports.http, VANISHED: None},
        "broken_urls": [sample.url for sample in samples if fates.fault.get(sample.uid) == "resolver"],
    }


def _answer(sample: Sample, fates: Fates) -> Answer:
    fault, data = fates.fault.get(sample.uid, ""), sample.image
    made = {
        "robots": lambda: Answer(data, headers={"X-Robots-Tag": "noai, noimageai"}),
        "timeout_body": lambda: Answer(data, conduct=TRICKLE),
        "cut": lambda: Answer(data, conduct=CUT),
        "redirect_loop": lambda: Answer(status=302, headers={"Location": sample.url}),
        "corrupt": lambda: Answer(corrupt(data)),
        "too_small": lambda: Answer(jpeg(picture(5).resize((40, 60)))),
        "too_large": lambda: Answer(jpeg(picture(5).resize((400, 400)))),
        "too_long": lambda: Answer(jpeg(picture(5).resize((400, 60)))),
        "bomb": lambda: Answer(png(Image.new("1", (60_000, 30_000)))),
    }
    if fault in ANSWERS:
        return ANSWERS[fault]
    return made[fault]() if fault in made else Answer(_content(sample, fates.content.get(sample.uid, "same")))


def _content(sample: Sample, kind: str) -> bytes:
    if kind == "same":
        return sample.image
    change = {"rewrapped": rewrapped, "recompressed": recompressed, "resized": resized}.get(kind)
    if change:
        return change(sample.image)
    return placeholder() if kind == "placeholder" else jpeg(picture(100_000 + int(sample.uid[:6], 16)))


def _write_list(samples: list[Sample], path: Path) -> None:
    columns = {
        "uid": [sample.uid for sample in samples],
        "url": [sample.url for sample in samples],
        "text": [sample.text for sample in samples],
        "original_width": [sample.size[0] for sample in samples],
        "original_height": [sample.size[1] for sample in samples],
        "clip_b32_similarity_score": [sample.scores[0] for sample in samples],
        "clip_l14_similarity_score": [sample.scores[1] for sample in samples],
        "sha256": [sample.sha256 for sample in samples],
        "language": [sample.language for sample in samples],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
