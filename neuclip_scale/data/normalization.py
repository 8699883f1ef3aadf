"""From bytes of colour to the numbers that an encoder takes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Normalization(NamedTuple):
    """(pixel / 255 - mean) / std, by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] -> float32 of the same shape, on the same device."""
        factor, offset = _affine(self, pixels.device)
        if pixels.device.type != "cpu" or pixels.dim() != 4:
            return pixels.to(torch.float32).mul_(factor).add_(offset)
        out = torch.empty(pixels.shape, dtype=torch.float32)
        for row, target in zip(pixels, out, strict=True):  # one at a time stays in the cache
            torch.mul(row, factor, out=target).add_(offset)
        return out


@functools.lru_cache(maxsize=16)
def _affine(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] each. Cached: a copy to a GPU for every batch would make the host wait for it."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization)
    factor, offset = 1 / (255 * std), -mean / std
    both = torch.stack((factor, offset)).to(torch.float32).reshape(2, 3, 1, 1).to(device)
    return both[0], both[1]
