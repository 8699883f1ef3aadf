"""SigLIP's pairwise sigmoid loss over all similarities, tile by tile (arXiv 2303.15343)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from neuclip_scale.similarity.pairs import BatchShape, PairFeatures
from neuclip_scale.similarity.tiled import DEFAULT_TILE_SIZE, TileOptions, similarity_tiles, tile_edge


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
    if not pairs.has_positives:
        return SigmoidSums(loss, weight, image, text)
    positives = scale * pairs.positives() + bias
    image.sub_(pairs.text)
    text.sub_(pairs.image)
    return SigmoidSums(loss - positives.sum(), weight - pairs.local_size, image, text)


def pair_sigmoids_flops(shape: BatchShape) -> int:
    """FLOPs of `pair_sigmoids` on one rank: one sweep of three products, or two sweeps of two."""
    return shape.products(3 if shape.is_whole else 4)


def _sweep(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, *, columns_too: bool, **options: Unpack[TileOptions]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, total = left.new_zeros(()), left.new_zeros(())
    left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right) if columns_too else right[:0]
    scratch = left.new_empty(3, tile_edge(left, options["tile_size"]) ** 2 if left.device.type == "cpu" else 0)
    for rows, columns, logits in similarity_tiles(left, right, scale, **options):
        logits += bias
        loss += _softplus_sum(logits, scratch)
        weights = logits.sigmoid_()
        total += weights.sum()
        left_gradient[rows].addmm_(weights, right[columns])
        if columns_too:
            right_gradient[columns].addmm_(weights.T, left[rows])
    return loss, total, left_gradient, right_gradient


def _softplus_sum(logits: Tensor, scratch: Tensor) -> Tensor:
    """sum log(1 + exp z), as max(z, 0) + log(1 + e) with e = exp(-|z|).

    torch's softplus calls log1p, which on a CPU costs nine times a logarithm: more than a quarter of the whole loss.
    With u the rounded 1 + e, log(1 + e) = log(u) + (e - (u - 1)) up to rounding.
    """
    if logits.device.type != "cpu":
        return F.softplus(logits).sum()
    e, u, rest = (part[: logits.numel()].view_as(logits) for part in scratch)
    total = torch.clamp(logits, min=0, out=rest).sum()
    torch.abs(logits, out=e).neg_().exp_()
    torch.add(e, 1, out=u)
    torch.sub(u, 1, out=rest)
    return total + e.sub_(rest).sum() + u.log_().sum()
