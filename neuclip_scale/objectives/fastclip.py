"""FastCLIP: one running normalizer estimate per sample (arXiv 2407.01445)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.normalizers import NormalizerTable
from neuclip_scale.objectives.base import MarginObjective
from neuclip_scale.similarity import PairFeatures


def gamma_at(samples_seen: int, dataset_size: int, gamma_min: float, decay_epochs: float) -> float:
    """Weight of the newest estimate: 1 in epoch 0, then a cosine from 1 to gamma_min at `decay_epochs`.

    With decay_epochs = 0 it is gamma_min from epoch 1 on.
    """
    epoch = samples_seen // dataset_size
    if epoch == 0:
        return 1.0
    if epoch >= decay_epochs:
        return gamma_min
    return 0.5 * (1 + math.cos(math.pi * epoch / decay_epochs)) * (1 - gamma_min) + gamma_min


class FastCLIPv3(MarginObjective):
    """RGCL-g: the robust global contrastive loss with one learned temperature, normalizers from the u table."""

    def __init__(
        self,
        *,
        dataset_size: int,
        rho: float,
        eps: float,
        gamma_min: float,
        gamma_decay_epochs: float,
        tile_size: int,
    ) -> None:
        super().__init__(rho=rho, eps=eps, tile_size=tile_size)
        self.table = NormalizerTable(dataset_size)
        self.gamma_min, self.gamma_decay_epochs = gamma_min, gamma_decay_epochs

    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `MarginObjective.estimate`; a = log(eps + u) with u already moved by this batch."""
        if world_index is None:
            raise ValueError("fastclip-v3: sample_index is missing. Give the dense index of each pair in the data set.")
        world_batch_rows = all_gather_rows(batch_rows)
        gamma = gamma_at(self.samples_seen, self.table.dataset_size, self.gamma_min, self.gamma_decay_epochs)
        if self.training:
            log_u = self.table.update(world_index, world_batch_rows, gamma)
        else:
            log_u = self.table.lookup(world_index)
            log_u = torch.where(torch.isinf(log_u), world_batch_rows, log_u)
        world_rows = self.add_eps(log_u)
        return pairs.local_rows(world_rows), world_rows, {"normalizer/gamma": scale.new_tensor(gamma)}

    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """log(eps + u)."""
        return rows

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's shard of the table."""
        return {"log_u": self.table.log_u}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """See `Objective.load_rank_states`."""
        self.table.load_shards([state["log_u"] for state in states])
