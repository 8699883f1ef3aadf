"""A running average of the weights, spread over the ranks as the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

AVERAGE = "ema"
"""Name of a parameter's running average beside its `value`, in `Engine.named_state` and in checkpoints."""


class WeightAverage:
    """The average's parts on this rank, by parameter's name; a part is what a rank holds of a parameter."""

    def __init__(self, parts: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parts = {name: part.clone() for name, part in parts.items()}

    @torch.no_grad()
    def update(self, parts: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after `step` steps. Early on recent ones weigh more: those at the start mean nothing."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, part in parts.items():
            self.parts[name].lerp_(part, weight)

    @contextmanager
    @torch.no_grad()
    def in_place_of(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the weights hold the average."""
        self._exchange(parts)
        try:
            yield
        finally:
            self._exchange(parts)

    def _exchange(self, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            kept = part.clone()
            part.copy_(self.parts[name])
            self.parts[name].copy_(kept)
