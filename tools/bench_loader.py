"""Pictures per second of one core, from shards to a batch: `python tools/bench.py loader`."""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import bench_turns

SIZE, WIDTH, HEIGHT = 224, 512, 384
PEER, BOUND = "open_clip", "bound: turbo decode"
PEER_HUGE = "open_clip, huge pages"
OURS_FOR_GPU = "ours, floats made on the GPU"
DEFAULT = (
    PEER, PEER_HUGE, "ours", OURS_FOR_GPU, "ours, decoder=pillow", "ours, decoder=reference", "bound: Pillow decode",
    BOUND, "bound: turbo decode at 1/2",
)  # fmt: skip
PREFETCH = 2
"""Batches that a worker has ready at most: torch's default, and ours."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Training loaders at 224 pixels on shards made for it, by the time that their processes spend on a core."""

    num_pictures: int = 2048
    """Pairs in the shards; every picture stands there eight times."""
    batch_size: int = 128
    """Pairs in a batch."""
    num_batches: int = 12
    """Batches measured; those before, which start everything and fill what workers have ready, are not."""
    num_workers: int = 0
    """Decoding processes of each loader; their time counts with that of the process that takes the batches."""
    repeats: int = 5
    """Rounds through the contenders; medians count, of ratios those within a round."""
    contenders: tuple[str, ...] = DEFAULT
    """What to measure, by turns, each in a process of its own."""
    json: str = ""
    """Write every measurement to this file."""


def photograph(seed: int) -> Any:
    """A 512 x 384 picture with the spectrum of photographs (amplitude about 1/f), mostly in its lightness."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(generator.standard_normal((3, HEIGHT, WIDTH))) / frequency**1.3
    planes = np.fft.irfft2(noise, s=(HEIGHT, WIDTH))
    planes *= np.array([55, 20, 20])[:, None, None] / planes.std(axis=(1, 2), keepdims=True)
    ycc = np.clip(128 + planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(ycc, "YCbCr").convert("RGB")


def write_shards(folder: Path, num_pictures: int, num_shards: int = 1) -> float:
    """Shards of 512 pairs, or fewer for `num_shards` of them at least; returns the mean size of a picture in bytes."""
    from neuclip_scale.data.shards import write_shard

    pictures = []
    for seed in range(max(1, num_pictures // 8)):
        stream = io.BytesIO()
        photograph(seed).save(stream, "JPEG", quality=73)
        pictures.append(stream.getvalue())
    # Cut where equal parts end: rounding a part's size up would leave fewer parts than asked for.
    count = max(num_shards, math.ceil(num_pictures / 512))
    cuts = [number * num_pictures // count for number in range(count + 1)]
    for shard, (first, end) in enumerate(pairwise(cuts)):
        samples = (
            {"__key__": f"{i:08d}", "jpg": pictures[i % len(pictures)], "txt": f"a photograph of noise number {i}",
             "json": {"uid": f"{i:032x}", "key": f"{i:08d}"}}
            for i in range(first, end)
        )  # fmt: skip
        write_shard(folder / f"{shard:05d}.tar", samples)
    return statistics.mean(map(len, pictures))


def child(options: Loader, contender: str, folder: Path) -> None:
    """Measure one contender in this process and print a JSON line."""
    from neuclip_scale.commands.train import use_huge_pages

    if contender.startswith("ours") or contender == PEER_HUGE:
        use_huge_pages()  # as `neuclip train` does
    import torch

    torch.set_num_threads(1)
    counts = _contender(options, contender, folder)
    for _ in range(max(1, (PREFETCH + 1) * options.num_workers)):  # made before the clock starts, they would be free
        next(counts)
    began, spent = time.perf_counter(), _core_seconds()
    num_pictures = sum(islice(counts, options.num_batches))
    seconds, spent = time.perf_counter() - began, _core_seconds() - spent
    print(json.dumps({"per_core_second": num_pictures / spent, "per_second": num_pictures / seconds}))


def _contender(options: Loader, contender: str, folder: Path) -> Iterator[int]:
    """Numbers of pictures that were made ready, batch by batch, for ever."""
    if contender in (PEER, PEER_HUGE):
        return _open_clip(options, folder)
    if contender.startswith("ours"):
        return _ours(options, folder, contender.partition("decoder=")[2] or "auto", contender == OURS_FOR_GPU)
    return _decoding(options, folder, contender)


def _ours(options: Loader, folder: Path, decoder: Any, for_gpu: bool) -> Iterator[int]:
    """Our loader; `for_gpu` hands out the bytes that a GPU is given, and that it normalises itself."""
    from neuclip_scale.config import DataConfig, ModelConfig
    from neuclip_scale.data.loader import TrainLoader
    from neuclip_scale.data.manifest import build_manifest
    from neuclip_scale.data.shards import expand_shards
    from neuclip_scale.data.transforms import TrainTransform
    from neuclip_scale.models.presets import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
    from neuclip_scale.models.tokenizer import build_tokenizer

    class Bytes(TrainTransform):
        normalization = None  # type: ignore[assignment]

    loader = TrainLoader(
        build_manifest(expand_shards(str(folder))),
        DataConfig(num_workers=options.num_workers, decoder=decoder),
        global_batch_size=options.batch_size,
        rank=0,
        world_size=1,
        seed=SEED,
        transform=(Bytes if for_gpu else TrainTransform)(SIZE, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD),
        tokenizer=build_tokenizer(ModelConfig()),
    )
    for loaded in loader:
        _check(loaded.batch.images, loaded.batch.tokens, not for_gpu)
        yield len(loaded.batch)


def _open_clip(options: Loader, folder: Path) -> Iterator[int]:
    """open_clip's own pipeline with its own transform and tokenizer."""
    import open_clip
    import open_clip_train.data as peer

    # webdataset 1.0 marks the end of a shard by a sample without a name, which open_clip's reader stumbles over.
    peer.tar_file_expander = functools.partial(peer.tar_file_expander, eof_value=None)
    preprocess = open_clip.image_transform(
        SIZE, is_train=True, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    arguments = argparse.Namespace(
        train_data=f"{folder}/{{00000..{len(list(folder.glob('*.tar'))) - 1:05d}}}.tar",
        train_num_samples=options.num_pictures, train_data_upsampling_factors=None, dataset_resampled=False,
        seed=SEED, batch_size=options.batch_size, world_size=1, workers=options.num_workers,
    )  # fmt: skip
    data = peer.get_wds_dataset(arguments, preprocess, True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    epoch = 0
    while True:
        data.set_epoch(epoch)
        for images, texts in data.dataloader:
            _check(images, texts)
            yield len(images)
        epoch += 1


def _check(images: Any, tokens: Any, floats: bool = True) -> None:
    assert images.shape[1:] == (3, SIZE, SIZE), images.shape
    assert images.is_floating_point() == floats, images.dtype
    assert tokens.shape == (len(images), 77), tokens.shape


def _decoding(options: Loader, folder: Path, contender: str) -> Iterator[int]:
    """Decoding alone, of pictures in memory."""
    import simplejpeg
    from PIL import Image

    from neuclip_scale.data.shards import index_shard, read_member

    half = {"min_width": WIDTH // 2, "min_height": HEIGHT // 2}
    decode: Callable[[bytes], Any] = {
        "bound: Pillow decode": lambda data: Image.open(io.BytesIO(data)).load(),
        BOUND: simplejpeg.decode_jpeg,
        "bound: turbo decode at 1/2": lambda data: simplejpeg.decode_jpeg(data, **half),
    }[contender]
    index = index_shard(folder / "00000.tar")
    with open(index.path, "rb") as stream:
        spans = [index.members(i)["jpg"] for i in range(min(options.batch_size, index.num_samples))]
        pictures = [read_member(stream.fileno(), span) for span in spans]
    while True:
        for data in pictures:
            decode(data)
        yield len(pictures)


def _core_seconds() -> float:
    """Time that this process and its children, those that have ended too, have spent on a core."""
    import psutil

    children, ended = psutil.Process().children(recursive=True), resource.getrusage(resource.RUSAGE_CHILDREN)
    # Linux's clock of another process (MAKE_PROCESS_CPUCLOCK in the kernel): psutil's ticks are 10 ms.
    running = sum(time.clock_gettime((~child.pid << 3) | 2) for child in children)
    return time.process_time() + running + ended.ru_utime + ended.ru_stime


def check(options: Loader) -> None:
    """Raise SystemExit for what is no contender, and for fewer pictures than workers."""
    known = (*DEFAULT, "ours, decoder=turbo", "ours, decoder=auto")
    bench_turns.refuse_unknown("contenders", options.contenders, known)
    if not 0 <= options.num_workers <= options.num_pictures:
        reason = f"each needs a shard of --num-pictures {options.num_pictures}, and below 0 there are none"
        raise SystemExit(f"--num-workers {options.num_workers}: {reason}. Give fewer workers, or more pictures.")


def measure(options: Loader) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds beside the options."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = write_shards(Path(folder), options.num_pictures, options.num_workers)
        for repeat in range(options.repeats):
            for name in options.contenders:
                print(f"\r{repeat + 1}/{options.repeats} {name:<30}", end="", file=sys.stderr, flush=True)
                runs[name].append(_run_child(options, name, folder))
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    rates = {name: statistics.median(run["per_core_second"] for run in rows) for name, rows in runs.items()}
    rows = [_row(name, rates, runs) for name in options.contenders]
    return {"load_average": os.getloadavg()[0], "picture_bytes": mean_bytes, "rows": rows, "runs": runs}


def _run_child(options: Loader, contender: str, folder: str) -> dict[str, float]:
    arguments = [sys.executable, __file__, contender, json.dumps(asdict(options)), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, rates: dict[str, float], runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    each = [run["per_core_second"] for run in runs[name]]
    row: dict[str, Any] = {"contender": name, "per_core_second": rates[name], "range": [min(each), max(each)]}
    if PEER in runs:  # one beside the other: a machine that is slow for a minute is slow for both
        ratios = [rate / run["per_core_second"] for rate, run in zip(each, runs[PEER], strict=True)]
        row["ratio"], row["ratio_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
    if BOUND in rates:
        row["share_of_bound"] = rates[name] / rates[BOUND]
    return row


def show(options: Loader, result: dict[str, Any]) -> None:
    """Print the comparison."""
    print(
        f"{WIDTH} x {HEIGHT} JPEG of {result['picture_bytes'] / 1000:.0f} kB to {SIZE} pixels, batch "
        f"{options.batch_size}, {options.num_workers} worker(s), commit {result['commit']}"
    )
    print(f"{'':<30}{'per core second':>16}{'range':>14}{'ratio':>8}{'range':>12}{'of ' + BOUND:>24}")
    for row in result["rows"]:
        low, high = row["range"]
        least, most = row.get("ratio_range", (float("nan"), float("nan")))
        print(
            f"{row['contender']:<30}{row['per_core_second']:>16.0f}{f'{low:.0f}-{high:.0f}':>14}"
            f"{row.get('ratio', float('nan')):>8.2f}{f'{least:.1f}-{most:.1f}':>12}"
            f"{row.get('share_of_bound', float('nan')):>24.0%}"
        )


if __name__ == "__main__":
    values = json.loads(sys.argv[2])
    child(Loader(**{**values, "contenders": tuple(values["contenders"])}), sys.argv[1], Path(sys.argv[3]))
