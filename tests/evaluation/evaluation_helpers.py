"""Small real evaluation sets, and a model whose answers are known."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from neuclip_scale.data.shards import write_shard
from neuclip_scale.data.synthetic import write_synthetic_shards

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Output(NamedTuple):
    image_features: Tensor | None
    text_features: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None


class ColourModel(nn.Module):
    """Embeds a picture as its mean colour and a text as the sum of the colours it names."""

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> Output:
        image_features = None if images is None else F.normalize(images.mean(dim=(2, 3)), dim=-1)
        text_features = None
        if tokens is not None:
            palette = torch.tensor([[0, 0, 0], *COLOURS.values()], dtype=torch.float32)
            text_features = F.normalize(palette[tokens].sum(dim=1), dim=-1)
        return Output(image_features, text_features, torch.ones(1), None)


class ColourTokenizer:
    """One token a word: the colour's number, 0 for other words."""

    context_length, vocab_size = 8, 5

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        lines = [texts] if isinstance(texts, str) else texts
        numbers = {name: position for position, name in enumerate(COLOURS, start=1)}
        rows = [[numbers.get(word, 0) for word in line.strip(".").split()][: self.context_length] for line in lines]
        return torch.tensor([row + [0] * (self.context_length - len(row)) for row in rows])


def jpeg(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder: Path, shards: Sequence[Sequence[Mapping[str, object]]], **files: str) -> Path:
    """A set with the given samples per shard; `files` are names (without .txt) and contents."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    for number, samples in enumerate(shards):
        write_shard(
            folder / "test" / f"{number}.tar",
            [{"__key__": f"{number}_{i:04d}", **sample} for i, sample in enumerate(samples)],
        )
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content)
    return folder


def held_out(folder: Path) -> Path:
    """A folder of evaluation sets with one of retrieval."""
    write_synthetic_shards(folder / "made", num_samples=10, samples_per_shard=10, image_size=40, seed=2)
    test = folder / "eval" / "retrieval" / "test"
    test.mkdir(parents=True)
    (folder / "made" / "00000.tar").rename(test / "0.tar")
    (test / "nshards.txt").write_text("1\n")
    (test.parent / "dataset_type.txt").write_text("retrieval\n")
    return folder / "eval"
