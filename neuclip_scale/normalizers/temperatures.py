"""A temperature of its own for every pair and side, each with its own Adam (iSogCLR, FastCLIP v2)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuclip_scale.config import IndividualTemperatureConfig
from neuclip_scale.normalizers.table import SampleTable

_TAU, _FIRST, _SECOND, _VISITS = slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)


class IndividualTemperatures(SampleTable):
    """tau of the image and of the text of every pair, Adam's two moments for both, and the number of visits.

    28 bytes a pair over all ranks together. Adam's bias correction counts the pair's own visits.
    """

    def __init__(
        self,
        dataset_size: int,
        section: IndividualTemperatureConfig,
        *,
        initial: float,
        minimum: float,
        maximum: float,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(dataset_size, (initial, initial, 0, 0, 0, 0, 0), rank=rank, world_size=world_size)
        self.section, self.minimum, self.maximum = section, minimum, maximum

    @torch.no_grad()
    def lookup(self, world_index: Tensor) -> Tensor:
        """tau of the whole batch, [B] -> [B, 2] (collective)."""
        mine, places = self.places(world_index)
        return self.collect(mine, self.padded[places, _TAU])

    @torch.no_grad()
    def update(self, world_index: Tensor, world_gradient: Tensor) -> None:
        """One Adam step of each pair in the batch on its gradients [B, 2], which are clamped first."""
        _, places = self.places(world_index)
        limit, (beta1, beta2) = self.section.max_gradient, self.section.betas
        rows, gradient = self.padded[places], world_gradient.clamp(-limit, limit).to(self.padded.dtype)
        rows[:, _FIRST] = beta1 * rows[:, _FIRST] + (1 - beta1) * gradient
        rows[:, _SECOND] = beta2 * rows[:, _SECOND] + (1 - beta2) * gradient.square()
        rows[:, _VISITS] += 1
        first = rows[:, _FIRST] / (1 - beta1 ** rows[:, _VISITS])
        second = rows[:, _SECOND] / (1 - beta2 ** rows[:, _VISITS])
        tau = rows[:, _TAU] - self.section.learning_rate * first / (second.sqrt() + self.section.adam_eps)
        rows[:, _TAU] = tau.clamp(self.minimum, self.maximum)
        self.padded[places] = rows
