"""SigLIP's pairwise sigmoid loss over the global batch (arXiv 2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuclip_scale.objectives.base import Objective, ObjectiveOutput
from neuclip_scale.similarity import BatchShape, PairFeatures, pair_sigmoids, pair_sigmoids_flops, row_dots


class SigLIP(Objective):
    """L = -1/B sum_ij log sigmoid(z_ij (s_ij/tau + bias)), z_ij = 1 for the positive pair and -1 for the others.

    It has no normalizer: every pair is a problem of its own.
    """

    def flops(self, shape: BatchShape) -> int:
        """See `Objective.flops`."""
        return pair_sigmoids_flops(shape)

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """See `Objective.compute`; a bias that is not given is 0."""
        B = pairs.global_size
        shift = torch.zeros_like(scale) if bias is None else bias
        sums = pair_sigmoids(pairs, scale, shift, tile_size=self.tile_size)
        image, text = sums.image_gradient.mul_(scale / B), sums.text_gradient.mul_(scale / B)
        return ObjectiveOutput(
            loss=sums.loss / B,
            image_gradient=image,
            text_gradient=text,
            logit_scale_gradient=(row_dots(image, pairs.image).sum() / scale).reshape(1),
            metrics={} if bias is None else {"logit_bias": bias.reshape(())},
            normalizers=None,
            logit_bias_gradient=None if bias is None else (sums.weight / B).reshape(1),
        )
