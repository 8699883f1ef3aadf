"""CLIP's symmetric cross-entropy over the global batch (arXiv 2103.00020, as trained by OpenCLIP)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.objectives.base import Normalizers, Objective, ObjectiveOutput
from neuclip_scale.similarity import (
    BatchShape,
    PairFeatures,
    pair_gradients,
    pair_gradients_flops,
    pair_logsumexp,
    pair_logsumexp_flops,
    row_dots,
)


class OpenCLIP(Objective):
    """L = 1/(2B) sum_i [ logsumexp_j s_ij/tau - s_ii/tau ] + the same with texts as anchors."""

    def flops(self, shape: BatchShape) -> int:
        """See `Objective.flops`."""
        return pair_logsumexp_flops(shape) + pair_gradients_flops(shape)

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """See `Objective.compute`. Rows are log sum_j exp((s_ij - s_ii)/tau), the positive pair included."""
        B = pairs.global_size
        absolute = torch.stack(pair_logsumexp(pairs, scale, exclude_diagonal=False, tile_size=self.tile_size), 1)
        shifts = all_gather_rows(absolute) + math.log(2 * B) - scale.log()
        image, text = pair_gradients(
            pairs, scale, shifts[:, 0], shifts[:, 1], exclude_diagonal=False, tile_size=self.tile_size
        )
        image.addcmul_(scale / B, pairs.text, value=-1)
        text.addcmul_(scale / B, pairs.image, value=-1)
        rows = absolute - (scale * pairs.positives())[:, None]
        # The positive pair contributes exp(0) = 1 to each sum; what is left is (B - 1) g.
        batch_rows = torch.log(torch.expm1(rows).clamp_min(torch.finfo(rows.dtype).tiny)) - math.log(B - 1)
        return ObjectiveOutput(
            loss=rows.sum() / (2 * B),
            image_gradient=image,
            text_gradient=text,
            logit_scale_gradient=(row_dots(image, pairs.image).sum() / scale).reshape(1),
            metrics={"normalizer/batch_mean": batch_rows.mean()},
            normalizers=Normalizers(rows=rows, estimates=batch_rows, batch_rows=batch_rows),
        )
