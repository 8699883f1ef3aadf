"""RGCL with a learned temperature for every pair and side: iSogCLR and FastCLIP v2 (arXiv 2305.11965, 2407.01445)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.normalizers import IndividualTemperatures, NormalizerTable
from neuclip_scale.objectives.base import Normalizers, Objective, ObjectiveOutput, margin_gradients
from neuclip_scale.objectives.fastclip import GammaSchedule, RunningNormalizers
from neuclip_scale.sections import section
from neuclip_scale.similarity import (
    BatchShape,
    PairFeatures,
    pair_gradients_flops,
    pair_row_sums,
    pair_row_sums_flops,
)


class RGCL(Objective):
    """L = 1/B sum_i [ tau1_i (log(eps + u1_i) + rho) + tau2_i (log(eps + u2_i) + rho) ], tau learned for each i.

    u and the encoders' gradient use the taus as they were before this batch; then each takes its own Adam step on

        dL_i/dtau_i = log(eps + u_i) + rho - 1/(eps + u_i) mean_{j != i} exp(x_ij) x_ij,   x_ij = (s_ij - s_ii)/tau_i

    The model's global logit_scale is not used and gets no gradient.
    """

    def __init__(
        self,
        name: str,
        *,
        dataset_size: int,
        gamma: GammaSchedule,
        temperatures: IndividualTemperatures,
        rho: float,
        eps: float,
        tile_size: int,
    ) -> None:
        super().__init__(tile_size)
        self.rho, self.log_eps = rho, math.log(eps) if eps > 0 else -math.inf
        self.table, self.temperatures = NormalizerTable(dataset_size), temperatures
        self.running = RunningNormalizers(self.table, gamma, name)

    def flops(self, shape: BatchShape) -> int:
        """See `Objective.flops`."""
        return pair_row_sums_flops(shape) + pair_gradients_flops(shape)

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """See `Objective.compute`."""
        if world_index is None:
            raise ValueError(
                f"{self.running.name}: sample_index is missing. Give the dense index of each pair in the data set."
            )
        B = pairs.global_size
        with section("normalizers/table"):
            world_tau = self.temperatures.lookup(world_index).to(scale)  # [B, 2]
        tau = pairs.local_rows(world_tau)
        sums = pair_row_sums(pairs, 1 / tau, tile_size=self.tile_size)
        own = pairs.positives()[:, None] / tau  # [b, 2]
        batch_rows = torch.stack([side.logsumexp for side in sums], 1) - own - math.log(B - 1)
        mean_margin = torch.stack([side.mean for side in sums], 1) - own

        log_u, metrics = self.running.log_u(world_index, batch_rows, self.samples_seen, training=self.training)
        world_rows = torch.logaddexp(log_u, log_u.new_full((), self.log_eps)).to(scale)
        rows = pairs.local_rows(world_rows)
        image, text = margin_gradients(
            pairs, 1 / world_tau, rows, world_rows, batch_rows, weight=torch.ones_like(scale), tile_size=self.tile_size
        )
        if self.training:
            gradient = rows + self.rho - (batch_rows - rows).exp() * mean_margin
            world_gradient = all_gather_rows(gradient)
            with section("normalizers/table"):
                self.temperatures.update(world_index, world_gradient)
        metrics |= {"normalizer/mean": rows.mean(), "normalizer/batch_mean": batch_rows.mean()}
        return ObjectiveOutput(
            loss=(tau * (rows + self.rho)).sum() / B,
            image_gradient=image,
            text_gradient=text,
            logit_scale_gradient=torch.zeros_like(scale),
            metrics=metrics | {"temperature/mean": tau.mean()},
            normalizers=Normalizers(rows=rows, estimates=rows, batch_rows=batch_rows, temperatures=tau),
        )

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's shards of both tables."""
        return {"log_u": self.table.rows, "temperatures": self.temperatures.rows}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """See `Objective.load_rank_states`."""
        self.table.load_shards([state["log_u"] for state in states])
        self.temperatures.load_shards([state["temperatures"] for state in states])
