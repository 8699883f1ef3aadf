"""What every objective does: from embeddings to their gradients, once the log-normalizers are known.

Gradients are of the GLOBAL mean loss. What is a sum over pairs (loss, gradient of logit_scale) is returned as this
rank's share, so that adding the shares of all ranks gives the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuclip_scale.normalizers import batch_log_normalizers
from neuclip_scale.similarity import (
    BatchShape,
    PairFeatures,
    pair_gradients,
    pair_gradients_flops,
    pair_logsumexp_flops,
    row_products,
)


class Normalizers(NamedTuple):
    """Log-normalizers of this rank's (image, text) anchors in one step, each [b, 2]."""

    rows: Tensor
    """As used in the gradient."""
    estimates: Tensor
    """What the objective takes log(eps + g) over the data set to be."""
    batch_rows: Tensor
    """log g over the mini-batch alone."""
    temperatures: Tensor | None = None
    """tau of every anchor, where it is not 1/logit_scale."""


class ObjectiveOutput(NamedTuple):
    """Result of one step; none of it has a graph."""

    loss: Tensor  # [], this rank's share of the global loss
    image_gradient: Tensor  # [b, d]
    text_gradient: Tensor  # [b, d]
    logit_scale_gradient: Tensor  # [1], this rank's share of dL/d(1/tau)
    metrics: dict[str, Tensor]  # [] each, means over this rank's pairs
    normalizers: Normalizers | None  # None for an objective without them
    logit_bias_gradient: Tensor | None = None  # [1], this rank's share; None for an objective without a bias


class Objective(nn.Module, ABC):
    """A global contrastive objective with whatever state its normalizers keep."""

    def __init__(self, tile_size: int) -> None:
        super().__init__()
        self.tile_size = tile_size
        self.num_steps = 0
        self.samples_seen = 0

    def forward(
        self,
        pairs: PairFeatures,
        logit_scale: Tensor,
        world_index: Tensor | None = None,
        logit_bias: Tensor | None = None,
    ) -> ObjectiveOutput:
        """One step (collective): update the normalizers in training mode, return loss and gradients.

        `pairs` of any floating dtype (sums of halves are fp32), `logit_scale` [1] = 1/tau in fp32 or fp64,
        `world_index` [B] dense sample indices of all ranks' pairs, `logit_bias` [1] for objectives that have one.
        """
        if pairs.global_size < 2:
            raise ValueError(f"batch of {pairs.global_size} pair: a contrastive loss needs at least 2 pairs in all.")
        if logit_bias is not None:
            logit_bias = logit_bias.detach()
        with torch.no_grad(), torch.cuda.device_of(pairs.image):  # Triton launches on the current one
            output = self.compute(pairs, logit_scale.detach(), world_index, logit_bias)
        if self.training:
            self.num_steps += 1
            self.samples_seen += pairs.global_size
        return output

    @abstractmethod
    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """The step itself, without a graph."""

    @abstractmethod
    def flops(self, shape: BatchShape) -> int:
        """FLOPs of the matrix products in one training step on one rank; element-wise work is not counted."""

    @property
    def needs_projections(self) -> bool:
        """Whether `pairs.projections` must be given (`CLIP.show_projections`)."""
        return False

    def get_extra_state(self) -> dict[str, int]:
        """Counters that the schedules depend on."""
        return {"num_steps": self.num_steps, "samples_seen": self.samples_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Inverse of `get_extra_state`."""
        self.num_steps, self.samples_seen = state["num_steps"], state["samples_seen"]

    def rank_state(self) -> dict[str, Tensor]:
        """State that differs between ranks; checkpoints keep one copy per rank."""
        return {}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Take over the `rank_state` of all ranks of the saved run, in rank order; their number may differ."""


class MarginObjective(Objective):
    """Losses over margins s_ij - s_ii whose normalizers are estimated outside the batch (FastCLIP, NeuCLIP).

    Global loss over the n pairs, a = log-normalizer, g the batch's estimate over its B - 1 negatives, c = tau, or 1
    if the loss is `unscaled`:

        L = c/B sum_i [ value(a1_i, g1_i) + value(a2_i, g2_i) ] + 2 rho tau
        dL/ds_ij = c/(tau B (B-1)) [ exp((s_ij - s_ii)/tau - a1_i) + exp((s_ij - s_jj)/tau - a2_j) ]      for j != i
    """

    def __init__(
        self, *, rho: float, eps: float, tile_size: int, unscaled: bool = False, constant_temperature: bool = False
    ) -> None:
        super().__init__(tile_size)
        self.rho = rho
        self.log_eps = math.log(eps) if eps > 0 else -math.inf
        self.unscaled, self.constant_temperature = unscaled, constant_temperature

    @abstractmethod
    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Update on the batch's log g [b, 2]; return a of this rank [b, 2] and of the world [B, 2], and metrics."""

    def estimate_flops(self, shape: BatchShape) -> int:
        """FLOPs of the matrix products in `estimate`, in training."""
        return 0

    def flops(self, shape: BatchShape) -> int:
        """See `Objective.flops`."""
        return pair_logsumexp_flops(shape) + self.estimate_flops(shape) + pair_gradients_flops(shape)

    @abstractmethod
    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """The loss's value per pair and side, before the factor c, [b, 2]."""

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """See `Objective.compute`."""
        batch_rows = torch.stack(batch_log_normalizers(pairs, scale, tile_size=self.tile_size), 1)  # [b, 2]
        rows, world_rows, metrics = self.estimate(pairs, scale, batch_rows, world_index)
        # c/tau, which multiplies every gradient.
        factor = scale if self.unscaled else torch.ones_like(scale)
        image, text = margin_gradients(
            pairs, scale, rows, world_rows, batch_rows, weight=factor, tile_size=self.tile_size
        )
        value = self.values(rows, batch_rows).sum() / pairs.global_size
        if not self.unscaled:
            value = value + 2 * self.rho * pairs.local_size / pairs.global_size
        loss = value * factor / scale
        metrics |= {"normalizer/mean": rows.mean(), "normalizer/batch_mean": batch_rows.mean()}
        return ObjectiveOutput(
            loss=loss.reshape(()),
            image_gradient=image,
            text_gradient=text,
            logit_scale_gradient=self._scale_gradient(pairs, scale, image, loss),
            metrics=metrics,
            normalizers=Normalizers(rows=rows, estimates=rows, batch_rows=batch_rows),
        )

    def _scale_gradient(self, pairs: PairFeatures, scale: Tensor, image: Tensor, loss: Tensor) -> Tensor:
        """This rank's share of dL/dk, k = 1/tau, [1].

        With M the mean of the values, L(k) = (M(k) + 2 rho)/k, or M(k) where unscaled, and k dM/dk = sum_ij dM/ds_ij
        s_ij. That sum is sum_i <I_i, dL/dI_i>, times k where scaled.
        """
        if self.constant_temperature:
            return torch.zeros_like(scale)
        inner = row_products(image, pairs.image).sum()
        return ((inner if self.unscaled else inner - loss) / scale).reshape(1)

    def add_eps(self, log_value: Tensor) -> Tensor:
        """log(eps + exp(log_value))."""
        return torch.logaddexp(log_value, log_value.new_full((), self.log_eps))


def margin_gradients(
    pairs: PairFeatures,
    scale: Tensor,
    rows: Tensor,
    world_rows: Tensor,
    batch_rows: Tensor,
    *,
    weight: Tensor,
    tile_size: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight tau/B sum_i [ exp(-a1_i) g1_i + exp(-a2_i) g2_i ], a constant -> image, text [b, d].

    `rows` [b, 2] and `world_rows` [B, 2] are a of this rank's pairs and of all, `batch_rows` [b, 2] log g. `scale` is
    1/tau, one element, or [B, 2] for a tau of each pair and side; `weight` one element.
    """
    B = pairs.global_size
    world_positives = pairs.world_positives()[:, None]  # [B, 1]
    shifts = world_rows + scale * world_positives + math.log(B * (B - 1)) - weight.log()  # [B, 2]
    image, text = pair_gradients(pairs, scale, shifts[:, 0], shifts[:, 1], exclude_diagonal=True, tile_size=tile_size)
    # s_ii stands in every margin of row i: dL/ds_ii = -1/B [ exp(-a1_i) g1_i + exp(-a2_i) g2_i ].
    pull = weight * (batch_rows - rows).exp().sum(1, keepdim=True) / B  # [b, 1]
    return image.addcmul_(pull, pairs.text, value=-1), text.addcmul_(pull, pairs.image, value=-1)
