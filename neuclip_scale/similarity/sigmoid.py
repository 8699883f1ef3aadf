"""SigLIP's pairwise sigmoid loss over all similarities, tile by tile (arXiv 2303.15343)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from neuclip_scale.similarity.pairs import BatchShape, PairFeatures
from neuclip_scale.similarity.tiled import DEFAULT_TILE_SIZE, TileOptions, similarity_tiles


class SigmoidSums(NamedTuple):
    """Sums over this rank's rows; z_ij = scale s_ij + bias, W_ij = sigmoid(z_ij) - [i = j], the derivative by z_ij."""

    loss: Tensor  # [], sum_ij of -log sigmoid(+-z_ij) over this rank's images and all texts
    weight: Tensor  # [], sum_ij W_ij over the same pairs
    image_gradient: Tensor  # [b, d], sum_j W_ij T_j
    text_gradient: Tensor  # [b, d], sum_i W_ij I_i


@torch.no_grad()
def pair_sigmoids(
    pairs: PairFeatures, scale: Tensor, bias: Tensor, *, tile_size: int = DEFAULT_TILE_SIZE
) -> SigmoidSums:
    """See `dispatch.pair_sigmoids`.

    -log sigmoid(-z) = softplus(z) for negatives and softplus(-z) = softplus(z) - z for the positive pair, so every
    entry is treated alike and the positives are put right afterwards.
    """
    options = TileOptions(tile_size=tile_size, exclude_diagonal=False, offset=pairs.offset)
    if pairs.is_whole:
        loss, weight, image, text = _sweep(pairs.image, pairs.text, scale, bias, columns_too=True, **options)
    else:
        loss, weight, image, _ = _sweep(pairs.image, pairs.world_text, scale, bias, columns_too=False, **options)
        _, _, text, _ = _sweep(pairs.text, pairs.world_image, scale, bias, columns_too=False, **options)
    positives = scale * pairs.positives() + bias
    return SigmoidSums(loss - positives.sum(), weight - pairs.local_size, image - pairs.text, text - pairs.image)


def pair_sigmoids_flops(shape: BatchShape) -> int:
    """FLOPs of `pair_sigmoids` on one rank: one sweep of three products, or two sweeps of two."""
    return shape.products(3 if shape.is_whole else 4)


def _sweep(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, *, columns_too: bool, **options: Unpack[TileOptions]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, total = left.new_zeros(()), left.new_zeros(())
    left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right) if columns_too else right[:0]
    for rows, columns, logits in similarity_tiles(left, right, scale, **options):
        logits += bias
        loss += F.softplus(logits).sum()
        weights = logits.sigmoid_()
        total += weights.sum()
        left_gradient[rows].addmm_(weights, right[columns])
        if columns_too:
            right_gradient[columns].addmm_(weights.T, left[rows])
    return loss, total, left_gradient, right_gradient
