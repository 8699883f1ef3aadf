"""FastCLIP and SogCLR: one running normalizer estimate per sample (arXiv 2407.01445, 2202.12387)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.normalizers import NormalizerTable
from neuclip_scale.objectives.base import MarginObjective
from neuclip_scale.sections import section
from neuclip_scale.similarity import PairFeatures


@dataclass(frozen=True)
class GammaSchedule:
    """Weight of the newest estimate: 1 in epoch 0, then a cosine from 1 to `minimum` at `decay_epochs`.

    With decay_epochs = 0 it is `minimum` from epoch 1 on. A `constant` schedule is `minimum` throughout (SogCLR).
    """

    minimum: float
    decay_epochs: float
    constant: bool = False

    def __call__(self, epoch: int) -> float:
        """gamma in `epoch`, 0-based."""
        if self.constant or (epoch > 0 and epoch >= self.decay_epochs):
            return self.minimum
        if epoch == 0:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * epoch / self.decay_epochs)) * (1 - self.minimum) + self.minimum


def later_gamma_min(num_epochs: float) -> float:
    """The rule of FastCLIP's authors for runs of any length: min(1, 4.177 epochs^-0.7265)."""
    return min(1.0, 4.177 * num_epochs**-0.7265)


class RunningNormalizers:
    """The u table with its schedule, shared by the objectives that use one."""

    def __init__(self, table: NormalizerTable, gamma: GammaSchedule, name: str) -> None:
        self.table, self.gamma, self.name = table, gamma, name

    @section("normalizers/table")
    def log_u(
        self, world_index: Tensor | None, batch_rows: Tensor, samples_seen: int, *, training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log u of the whole batch [B, 2], moved by its log g [b, 2] in training, and gamma (collective)."""
        if world_index is None:
            raise ValueError(
                f"{self.name}: sample_index is missing. Give the dense index of each pair in the data set."
            )
        world_batch_rows = all_gather_rows(batch_rows)
        gamma = self.gamma(samples_seen // self.table.dataset_size)
        if training:
            log_u = self.table.update(world_index, world_batch_rows, gamma)
        else:
            log_u = self.table.lookup(world_index)
            log_u = torch.where(torch.isinf(log_u), world_batch_rows, log_u)
        return log_u, {"normalizer/gamma": batch_rows.new_full((), gamma)}


class FastCLIP(MarginObjective):
    """Global contrastive losses with one temperature and normalizers from the u table: value log(eps + u).

    v0: unscaled, tau learned. v1 and SogCLR: tau constant. v3 (RGCL-g): tau learned, with 2 rho tau.
    """

    def __init__(
        self,
        name: str,
        *,
        dataset_size: int,
        gamma: GammaSchedule,
        eps: float,
        tile_size: int,
        rho: float = 0.0,
        unscaled: bool = False,
        constant_temperature: bool = False,
    ) -> None:
        super().__init__(
            rho=rho, eps=eps, tile_size=tile_size, unscaled=unscaled, constant_temperature=constant_temperature
        )
        self.table = NormalizerTable(dataset_size)
        self.running = RunningNormalizers(self.table, gamma, name)

    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `MarginObjective.estimate`; a = log(eps + u) with u already moved by this batch."""
        log_u, metrics = self.running.log_u(world_index, batch_rows, self.samples_seen, training=self.training)
        world_rows = self.add_eps(log_u)
        return pairs.local_rows(world_rows), world_rows, metrics

    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """log(eps + u)."""
        return rows

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's shard of the table."""
        return {"log_u": self.table.rows}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """See `Objective.load_rank_states`."""
        self.table.load_shards([state["log_u"] for state in states])


class RGCLg(MarginObjective):
    """RGCL-g with the mini-batch's own normalizers: FastCLIP v3 with gamma = 1, and so without a table."""

    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `MarginObjective.estimate`; a = log(eps + g)."""
        rows = self.add_eps(batch_rows)
        return rows, all_gather_rows(rows), {}

    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """log(eps + g)."""
        return rows
