"""The mini-batch estimate of the normalizers: what OpenCLIP's loss uses, and every other estimator's raw material."""

from __future__ import annotations

import math

from torch import Tensor

from neuclip_scale.similarity import PairFeatures, pair_logsumexp


def batch_log_normalizers(pairs: PairFeatures, scale: Tensor, *, tile_size: int) -> tuple[Tensor, Tensor]:
    """log g of this rank's pairs over the batch's B - 1 negatives -> (image_rows [b], text_rows [b]).

    g1_i = 1/(B-1) sum_{j != i} exp(scale (s_ij - s_ii)), g2_i likewise with images as negatives.
    """
    image_rows, text_rows = pair_logsumexp(pairs, scale, exclude_diagonal=True, tile_size=tile_size)
    own = scale * pairs.positives() + math.log(pairs.global_size - 1)
    return image_rows - own, text_rows - own
