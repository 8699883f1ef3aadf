"""Evaluation sets in clip_benchmark's webdataset layout, read from a local folder.

classnames.txt                              a classification set has it: one class a line
zeroshot_classification_templates.txt       its prompts, optional
dataset_type.txt                            "retrieval" in a retrieval set
test/nshards.txt, test/0.tar, test/1.tar    pictures with .cls (class number) or .txt (captions, one a line),
                                            and .npy (numbers that say which group a picture belongs to)
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neuclip_scale.data.shards import ShardError, index_shard, read_member
from neuclip_scale.data.transforms import EvalTransform, ImageError, decode_image
from neuclip_scale.evaluation.sharing import ALL, Share

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_PIXELS = 50_000_000
_DECODE_THREADS = 4
_MAX_GROUP = 1 << 53

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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which samples of a set are read, and what of them."""

    share: Share = ALL
    whole_shards: bool = False
    """A shard that is cut off or damaged is an error; otherwise what it holds before the damage is read."""
    group_columns: tuple[int, ...] = ()
    """Columns of each sample's .npy to read."""


EVERYTHING = Reading()


@dataclass(frozen=True)
class PictureBatch:
    """Decoded pictures [b, 3, H, W] and what the set says of each: a class number, or its captions."""

    images: Tensor
    labels: list[int]
    captions: list[list[str]]
    positions: list[int]
    """Of each picture in the whole set, unreadable samples counted."""
    groups: list[list[int]]
    """The columns asked for of each picture's .npy."""


def open_set(folder: Path) -> EvaluationSet:
    """The set in `folder`; raises `EvaluationDataError` when it is none or incomplete."""
    folder = Path(folder).resolve()
    kind_file, classes_file = folder / "dataset_type.txt", folder / "classnames.txt"
    kind = read_text(kind_file).strip() if kind_file.is_file() else ""
    if kind == "retrieval":
        return EvaluationSet(folder, "retrieval", (), _shards(folder))
    if not classes_file.is_file():
        raise EvaluationDataError(
            f"{folder} is no evaluation set: it has neither classnames.txt (zero-shot classification) nor a "
            "dataset_type.txt that says `retrieval`. Give a folder in clip_benchmark's webdataset layout."
        )
    # Not strip(): a name's position in the file is its class number.
    names = tuple(read_text(classes_file).rstrip("\n").split("\n"))
    if len(names) < 2:
        raise EvaluationDataError(f"{classes_file} names {len(names)} class(es): at least two are needed.")
    return EvaluationSet(folder, "zeroshot", names, _shards(folder))


def read_text(path: Path) -> str:
    """A set's text file; raises `EvaluationDataError` for one that is not in UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationDataError(f"{path} is no text in UTF-8 ({error}): fetch it again, or save it so.") from error


def read_batches(
    dataset: EvaluationSet,
    transform: ImageTransform,
    batch_size: int,
    unreadable: Unreadable,
    reading: Reading = EVERYTHING,
) -> Iterator[PictureBatch]:
    """Every usable sample in the order of the shards; those that are not usable are added to `unreadable`.

    A batch is made of `batch_size` samples that follow each other in the set, less those that are not usable: the
    same ones for every number of ranks. Raises `EvaluationDataError` if a class number does not exist, if a shard
    is damaged and `reading` wants it whole, or if no sample at all is usable.
    """
    num_usable = 0
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for chunk in _chunks(dataset, batch_size, unreadable, reading):
            tensors = list(pool.map(lambda sample: _decode(sample, transform), chunk))
            usable = []
            for sample, tensor in zip(chunk, tensors, strict=True):
                if isinstance(tensor, str):
                    unreadable.add(sample["__key__"], tensor)
                elif (reason := _annotation_fault(dataset, sample, reading)) is not None:
                    unreadable.add(sample["__key__"], reason)
                else:
                    usable.append((sample, tensor))
            if usable:
                num_usable += len(usable)
                yield _batch(dataset, usable)
    if not num_usable and reading.share.world_size == 1:
        raise nothing_usable(dataset.folder, unreadable.reasons)


def nothing_usable(folder: Path, reasons: list[str]) -> EvaluationDataError:
    """The error of a set without one usable sample."""
    return EvaluationDataError(f"{folder}: no sample is usable, first: {reasons[:1]}.")


def read_thumbnails(dataset: EvaluationSet, size: int = 96) -> list[Image.Image]:
    """The pictures of the same samples as `read_batches` gives, in its order, as squares of `size` pixels."""
    transform = EvalTransform(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return [
        Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        for batch in read_batches(dataset, transform, 256, Unreadable())
        for image in batch.images
    ]


def _chunks(
    dataset: EvaluationSet, batch_size: int, unreadable: Unreadable, reading: Reading
) -> Iterator[list[dict[str, Any]]]:
    """Samples as webdataset gives them, `__key__` and bytes by extension, batch after batch; and `__position__`."""
    chunk: list[dict[str, Any]] = []
    number = -1
    for position, sample in _samples(dataset, batch_size, unreadable, reading):
        if chunk and position // batch_size != number:
            yield chunk
            chunk = []
        number = position // batch_size
        chunk.append({**sample, "__position__": position})
    if chunk:
        yield chunk


def _samples(
    dataset: EvaluationSet, batch_size: int, unreadable: Unreadable, reading: Reading
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Position and members of the samples of this share.

    Read through our own index and not webdataset's: a tar that was cut off ends there without a word.
    """
    first = 0
    for shard in dataset.shards:
        index = index_shard(shard)
        if index.fault and reading.whole_shards:
            raise EvaluationDataError(f"{shard}: {index.fault}. Fetch this file again: part of a set is no result.")
        if index.fault and reading.share.rank == 0:
            unreadable.add(f"{shard.name} (shard)", index.fault)
        with open(shard, "rb") as stream:
            for position, key in enumerate(index.keys):
                if not reading.share.owns((first + position) // batch_size):
                    continue
                try:
                    members = {
                        extension: read_member(stream.fileno(), span)
                        for extension, span in index.members(position).items()
                    }
                except ShardError as error:
                    unreadable.add(key, str(error))
                else:
                    yield first + position, {"__key__": key, **members}
        first += len(index.keys)


def _batch(dataset: EvaluationSet, usable: list[tuple[dict[str, Any], Tensor]]) -> PictureBatch:
    images = torch.stack([tensor for _, tensor in usable])
    positions = [sample["__position__"] for sample, _ in usable]
    if dataset.task == "retrieval":
        return PictureBatch(images, [], [_captions(sample) for sample, _ in usable], positions, [])
    groups = [sample["__groups__"] for sample, _ in usable]
    return PictureBatch(images, [int(sample["cls"]) for sample, _ in usable], [], positions, groups)


def _decode(sample: dict[str, Any], transform: ImageTransform) -> Tensor | str:
    data = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
    if data is None:
        return f"no picture among its members {sorted(key for key in sample if not key.startswith('__'))}"
    return decode(data, transform)


def decode(data: bytes, transform: ImageTransform) -> Tensor | str:
    """A picture [3, H, W], or what is wrong with it."""
    try:
        return transform(decode_image(data, MAX_IMAGE_PIXELS))
    except ImageError as error:
        return str(error)


def _annotation_fault(dataset: EvaluationSet, sample: dict[str, Any], reading: Reading) -> str | None:
    try:
        if dataset.task == "retrieval":
            return None if _captions(sample) else "no caption"
        label = int(sample["cls"])
        sample["__groups__"] = _groups(sample["npy"], reading.group_columns) if reading.group_columns else []
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


def _groups(data: bytes, columns: tuple[int, ...]) -> list[int]:
    """Numbers of the wanted columns of an .npy; raises ValueError for bytes that hold no such numbers.

    Not np.load: it would take the memory that a header claims before it reads a byte.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except (EOFError, OSError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f".npy: {error or 'nested too deeply'}") from error
    if len(shape) != 1 or dtype.kind not in "iuf" or shape[0] <= max(columns):
        raise ValueError(f".npy holds {dtype} {shape}, not a row of more than {max(columns)} numbers")
    row = np.frombuffer(data, dtype, max(columns) + 1, stream.tell())
    values = [float(row[column]) for column in columns]
    if not all(0 <= value < _MAX_GROUP and value.is_integer() for value in values):
        raise ValueError(f".npy says {values}, but a group is a number from 0 on")
    return [int(value) for value in values]


def _captions(sample: dict[str, Any]) -> list[str]:
    return [line.strip() for line in sample["txt"].decode("utf-8").splitlines() if line.strip()]


def _shards(folder: Path) -> tuple[Path, ...]:
    counter = folder / "test" / "nshards.txt"
    try:
        count = int(counter.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationDataError(f"{counter} must hold the number of shards ({error}).") from error
    # Up to the first that lacks: the number may be any.
    shards = tuple(takewhile(Path.is_file, (folder / "test" / f"{number}.tar" for number in range(count))))
    if len(shards) < max(count, 1):
        lacks = folder / "test" / f"{len(shards)}.tar"
        raise EvaluationDataError(f"{counter} says {count} shard(s); missing: {lacks}.")
    return shards
