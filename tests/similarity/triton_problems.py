"""Small problems for the Triton kernels, on a GPU or in Triton's interpreter on a CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn.functional import normalize

from neuclip_scale.similarity import PairFeatures
from neuclip_scale.similarity.chunks import ChunkLimits

DEVICE = torch.device(os.environ.get("TRITON_TEST_DEVICE", "cpu"))
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
# Several ragged chunks for some 40 pairs, and sums that are split.
SMALL = ChunkLimits(edge=24, height=20, weight_bytes=20 * 27 * 4, split_depth=8)


def make_pairs(world: int, local: slice, dim: int, dtype: torch.dtype = torch.float32) -> PairFeatures:
    generator = torch.Generator().manual_seed(1000 * world + dim)
    image = normalize(torch.randn(world, dim, generator=generator), dim=1)
    text = normalize(image + 1.5 * dim**-0.5 * torch.randn(world, dim, generator=generator), dim=1)
    image, text = image.to(DEVICE, dtype), text.to(DEVICE, dtype)
    if local == slice(0, world):
        return PairFeatures.single(image, text)
    return PairFeatures(image[local], text[local], image, text, local.start)


def exact(pairs: PairFeatures) -> PairFeatures:
    """The same numbers in float64 on the CPU."""
    return PairFeatures(
        *(each.double().cpu() for each in (pairs.image, pairs.text, pairs.world_image, pairs.world_text)), pairs.offset
    )


def scalar(value: float) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def ramp(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, device=DEVICE)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, what: str) -> None:
    """Sums lose nothing of halves' products; gradients round each weight, to bf16 for halves."""
    limit = {"sums": 4e-5, "gradients": 3e-5 if dtype == torch.float32 else 1e-2}[what]
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected):
        assert mine.dtype == torch.float32
        largest = float(theirs.abs().max()) if what == "gradients" else 1.0
        torch.testing.assert_close(mine.double().cpu(), theirs.cpu(), rtol=0, atol=limit * max(largest, 1e-30))
