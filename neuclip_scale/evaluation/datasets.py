"""Evaluation sets in clip_benchmark's webdataset layout, read from a local folder.

classnames.txt                              a classification set has it: one class a line
zeroshot_classification_templates.txt       its prompts, optional
dataset_type.txt                            "retrieval" in a retrieval set
test/nshards.txt, test/0.tar, test/1.tar    pictures with .cls (class number) or .txt (captions, one a line)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from neuclip_scale.data.shards import ShardError, index_shard, read_member
from neuclip_scale.data.transforms import EvalTransform, ImageError, decode_image

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_PIXELS = 50_000_000
_DECODE_THREADS = 4

Task = Literal["zeroshot", "retrieval"]
ImageTransform = Callable[[Image.Image], Tensor]


class EvaluationDataError(ValueError):
    """An evaluation set that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class EvaluationSet:
    """One set on disk; `class_names` is empty for retrieval."""

    folder: Path
    task: Task
    class_names: tuple[str, ...]
    shards: tuple[Path, ...]


@dataclass
class Unreadable:
    """Samples that could not be used, with the reason; a score is reported together with their number."""

    reasons: list[str] = field(default_factory=list)

    def add(self, key: str, reason: str) -> None:
        self.reasons.append(f"{key}: {reason}")


@dataclass(frozen=True)
class PictureBatch:
    """Decoded pictures [b, 3, H, W] and what the set says of each: a class number, or its captions."""

    images: Tensor
    labels: list[int]
    captions: list[list[str]]


def open_set(folder: Path) -> EvaluationSet:
    """The set in `folder`; raises `EvaluationDataError` when it is none or incomplete."""
    folder = Path(folder).resolve()
    kind_file, classes_file = folder / "dataset_type.txt", folder / "classnames.txt"
    kind = kind_file.read_text("utf-8").strip() if kind_file.is_file() else ""
    if kind == "retrieval":
        return EvaluationSet(folder, "retrieval", (), _shards(folder))
    if not classes_file.is_file():
        raise EvaluationDataError(
            f"{folder} is no evaluation set: it has neither classnames.txt (zero-shot classification) nor a "
            "dataset_type.txt that says `retrieval`. Give a folder in clip_benchmark's webdataset layout."
        )
    # Not strip(): a name's position in the file is its class number.
    names = tuple(classes_file.read_text("utf-8").rstrip("\n").split("\n"))
    if len(names) < 2:
        raise EvaluationDataError(f"{classes_file} names {len(names)} class(es): at least two are needed.")
    return EvaluationSet(folder, "zeroshot", names, _shards(folder))


def read_batches(
    dataset: EvaluationSet, transform: ImageTransform, batch_size: int, unreadable: Unreadable
) -> Iterator[PictureBatch]:
    """Every usable sample in the order of the shards; those that are not usable are added to `unreadable`.

    Raises `EvaluationDataError` if a class number does not exist, or if no sample is usable.
    """
    num_usable = 0
    samples = _samples(dataset, unreadable)
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        while chunk := list(islice(samples, batch_size)):
            tensors = list(pool.map(lambda sample: _decode(sample, transform), chunk))
            usable = []
            for sample, tensor in zip(chunk, tensors, strict=True):
                if isinstance(tensor, str):
                    unreadable.add(sample["__key__"], tensor)
                elif (reason := _annotation_fault(dataset, sample)) is not None:
                    unreadable.add(sample["__key__"], reason)
                else:
                    usable.append((sample, tensor))
            if usable:
                num_usable += len(usable)
                yield _batch(dataset, usable)
    if not num_usable:
        raise EvaluationDataError(f"{dataset.folder}: no sample is usable, first: {unreadable.reasons[:1]}.")


def read_thumbnails(dataset: EvaluationSet, size: int = 96) -> list[Image.Image]:
    """The pictures of the same samples as `read_batches` gives, in its order, as squares of `size` pixels."""
    transform = EvalTransform(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return [
        Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        for batch in read_batches(dataset, transform, 256, Unreadable())
        for image in batch.images
    ]


def _samples(dataset: EvaluationSet, unreadable: Unreadable) -> Iterator[dict[str, Any]]:
    """Samples as webdataset gives them: `__key__` and bytes by extension.

    Read through our own index and not webdataset's: a tar that was cut off ends there without a word.
    """
    for shard in dataset.shards:
        index = index_shard(shard)
        if index.fault:
            unreadable.add(f"{shard.name} (shard)", index.fault)
        with open(shard, "rb") as stream:
            for position, key in enumerate(index.keys):
                try:
                    members = {
                        extension: read_member(stream.fileno(), span)
                        for extension, span in index.members(position).items()
                    }
                except ShardError as error:
                    unreadable.add(key, str(error))
                else:
                    yield {"__key__": key, **members}


def _batch(dataset: EvaluationSet, usable: list[tuple[dict[str, Any], Tensor]]) -> PictureBatch:
    images = torch.stack([tensor for _, tensor in usable])
    if dataset.task == "retrieval":
        return PictureBatch(images, [], [_captions(sample) for sample, _ in usable])
    return PictureBatch(images, [int(sample["cls"]) for sample, _ in usable], [])


def _decode(sample: dict[str, Any], transform: ImageTransform) -> Tensor | str:
    data = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
    if data is None:
        return f"no picture among its members {sorted(key for key in sample if not key.startswith('__'))}"
    try:
        return transform(decode_image(data, MAX_IMAGE_PIXELS))
    except ImageError as error:
        return str(error)


def _annotation_fault(dataset: EvaluationSet, sample: dict[str, Any]) -> str | None:
    try:
        if dataset.task == "retrieval":
            return None if _captions(sample) else "no caption"
        label = int(sample["cls"])
    except KeyError as error:
        return f"no .{error.args[0]} member"
    except ValueError as error:
        return f"unreadable annotation ({error})"
    if not 0 <= label < len(dataset.class_names):
        raise EvaluationDataError(
            f"{dataset.folder}: {sample['__key__']}.cls is {label}, but classnames.txt has "
            f"{len(dataset.class_names)} classes: the two do not belong together."
        )
    return None


def _captions(sample: dict[str, Any]) -> list[str]:
    return [line.strip() for line in sample["txt"].decode("utf-8").splitlines() if line.strip()]


def _shards(folder: Path) -> tuple[Path, ...]:
    counter = folder / "test" / "nshards.txt"
    try:
        count = int(counter.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationDataError(f"{counter} must hold the number of shards ({error}).") from error
    shards = tuple(folder / "test" / f"{number}.tar" for number in range(count))
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise EvaluationDataError(f"{counter} says {count} shard(s); missing: {', '.join(missing[:3]) or 'all'}.")
    return shards
