"""AmorLIP: a linear surrogate of the contrastive loss with amortized normalizers (arXiv 2505.18983)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuclip_scale.config import AmortizedConfig
from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.normalizers import AmortizedNormalizers, batch_log_normalizers
from neuclip_scale.objectives.base import Normalizers, Objective, ObjectiveOutput
from neuclip_scale.similarity import (
    BatchShape,
    PairFeatures,
    pair_gradients,
    pair_gradients_flops,
    pair_logsumexp_flops,
    row_products,
)


class AmorLIP(Objective):
    """L = c/B sum_i [ -2 s_ii/tau + S1_i/lambda1_i + S2_i/lambda2_i ] + rho tau, c = tau held constant.

    S1_i = sum_{j != i} exp(s_ij/tau) + w exp(s_ii/tau) over the batch, S2 likewise for texts, w the weight of the
    positive pair; lambda_i = beta lambda_previous(x_i) + (1 - beta) sum_{j != i} exp(s_ij/tau), a constant. rho has
    one value for each equal part of the run, as in the authors' published command.
    """

    def __init__(
        self,
        embed_dim: int,
        section: AmortizedConfig,
        *,
        dataset_size: int,
        num_epochs: float,
        tile_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__(tile_size)
        self.section, self.dataset_size, self.num_epochs = section, dataset_size, num_epochs
        self.networks = AmortizedNormalizers(embed_dim, section, seed)

    def flops(self, shape: BatchShape) -> int:
        """See `Objective.flops`."""
        return pair_logsumexp_flops(shape) + self.networks.flops(shape.local_size) + pair_gradients_flops(shape)

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """See `Objective.compute`. Rows are log lambda_i - s_ii/tau - log(B - 1), comparable with log g."""
        B, share = pairs.global_size, pairs.local_size / pairs.global_size
        batch_rows = torch.stack(batch_log_normalizers(pairs, scale, tile_size=self.tile_size), 1)  # [b, 2]
        own = (scale * pairs.positives())[:, None]  # [b, 1]
        log_sums = batch_rows + own + math.log(B - 1)
        log_lambda, metrics = self._log_lambda(pairs, log_sums)

        world_lambda = all_gather_rows(log_lambda) + math.log(B)
        image, text = pair_gradients(
            pairs, scale, world_lambda[:, 0], world_lambda[:, 1], exclude_diagonal=True, tile_size=self.tile_size
        )
        positive = self.section.positive_weight * (own - log_lambda).exp().sum(1, keepdim=True)  # [b, 1]
        image += (positive - 2) / B * pairs.text
        text += (positive - 2) / B * pairs.image

        value = ((log_sums - log_lambda).exp().sum() + positive.sum() - 2 * own.sum()) / B
        rho = self._rho()
        rows = log_lambda - own - math.log(B - 1)
        return ObjectiveOutput(
            loss=((value + rho * share) / scale).reshape(()),
            image_gradient=image,
            text_gradient=text,
            # c is a constant: only s/tau and rho tau depend on k = 1/tau.
            logit_scale_gradient=(
                row_products(image, pairs.image).sum() / scale - rho * share / scale.square()
            ).reshape(1),
            metrics=metrics | {"normalizer/mean": rows.mean(), "normalizer/batch_mean": batch_rows.mean()},
            normalizers=Normalizers(rows=rows, estimates=rows, batch_rows=batch_rows),
        )

    def _log_lambda(self, pairs: PairFeatures, log_sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """log lambda of this rank's anchors [b, 2]; in training the networks learn it (collective)."""
        image, text = pairs.image.to(log_sums.dtype), pairs.text.to(log_sums.dtype)
        if not self.training:
            return self.networks.blend(image, text, log_sums), {}
        self.networks.begin(self.samples_seen // self.dataset_size)
        log_lambda = self.networks.blend(image, text, log_sums)
        error = self.networks.fit(image, text, log_lambda)
        if self.num_steps % self.section.ema_every == 0:
            self.networks.update_average()
        return log_lambda, {"normalizer/network_error": error}

    def _rho(self) -> float:
        """The weight of this part of the run: equal whole epochs for each, the rest for the last; of a run with fewer
        epochs than weights, equal parts. A run of unknown length stays in the first.
        """
        weights, epochs = self.section.rho, self.samples_seen / self.dataset_size
        part = int(self.num_epochs) // len(weights)
        done = int(epochs) // part if part else int(len(weights) * epochs / (self.num_epochs or math.inf))
        return weights[min(done, len(weights) - 1)]
