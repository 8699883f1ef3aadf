"""The similarities' functions, whoever computes them: `choosing` says which implementation that is.

Both take the same products and hold no [b, B] matrix. Features in bf16 or fp16 (of which similarities lose nothing:
products of halves are exact in fp32) come out of torch as their fp32 copies would; everything returned is fp32, or
fp64 for fp64 features.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from neuclip_scale.sections import section
from neuclip_scale.similarity import ring, sigmoid, tiled
from neuclip_scale.similarity.choosing import SIMILARITIES, choose
from neuclip_scale.similarity.pairs import PairFeatures
from neuclip_scale.similarity.ring import RingPairs
from neuclip_scale.similarity.sigmoid import SigmoidSums
from neuclip_scale.similarity.tiled import DEFAULT_TILE_SIZE, RowSums


@section("similarities/sums")
@torch.no_grad()
def pair_logsumexp(
    pairs: PairFeatures, scale: Tensor, *, exclude_diagonal: bool, tile_size: int = DEFAULT_TILE_SIZE
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(scale s_ij) for this rank's images over all texts, and for its texts over all images.

    `scale` is 1/tau, one element. Returns (image_rows [b], text_rows [b]). With `exclude_diagonal` the sums leave out
    the positive pair. `tile_size` is torch's alone. No communication, but for `RingPairs`: there all four are
    collectives.
    """
    if isinstance(pairs, RingPairs):
        return ring.logsumexp(
            pairs,
            lambda block: pair_logsumexp(
                block, scale, exclude_diagonal=exclude_diagonal or not block.has_positives, tile_size=tile_size
            ),
        )
    if triton := _triton(pairs):
        with torch.cuda.device_of(pairs.image):
            return triton.pair_logsumexp(pairs, scale, exclude_diagonal=exclude_diagonal)
    return tiled.pair_logsumexp(pairs.full_precision(), scale, exclude_diagonal=exclude_diagonal, tile_size=tile_size)


@section("similarities/sums")
@torch.no_grad()
def pair_row_sums(
    pairs: PairFeatures, scales: Tensor, *, tile_size: int = DEFAULT_TILE_SIZE
) -> tuple[RowSums, RowSums]:
    """`pair_logsumexp` without the positive pair, where every row has a scale of its own, and the mean logits.

    `scales` [b, 2] are 1/tau of this rank's images and texts. Returns the sums of image rows and of text rows. One
    sweep for each direction. No communication.
    """
    if isinstance(pairs, RingPairs):
        return ring.row_sums(pairs, lambda block: pair_row_sums(block, scales, tile_size=tile_size))
    if triton := _triton(pairs):
        with torch.cuda.device_of(pairs.image):
            return triton.pair_row_sums(pairs, scales)
    return tiled.pair_row_sums(pairs.full_precision(), scales, tile_size=tile_size)


@section("similarities/gradients")
@torch.no_grad()
def pair_gradients(
    pairs: PairFeatures,
    scale: Tensor,
    image_shift: Tensor,
    text_shift: Tensor,
    *,
    exclude_diagonal: bool,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> tuple[Tensor, Tensor]:
    """Gradient rows of every global contrastive objective (docs/method.md, "One gradient shape").

    With G_ij = exp(k_i s_ij - image_shift_i) + exp(l_j s_ij - text_shift_j), i an image and j a text of the world,
    returns sum_j G_ij T_j for this rank's images and sum_i G_ij I_i for its texts, both [b, d]. `scale` is 1/tau, one
    element, or [B, 2]: k of every image and l of every text. The shifts [B] hold log-normalizers and all weights, so
    a weight costs nothing. With `exclude_diagonal` G_ii = 0. No communication.
    """
    if isinstance(pairs, RingPairs):
        return ring.gradients(
            pairs,
            lambda block: pair_gradients(
                block,
                scale if scale.numel() == 1 else block.tables(scale),
                block.tables(image_shift),
                block.tables(text_shift),
                exclude_diagonal=exclude_diagonal or not block.has_positives,
                tile_size=tile_size,
            ),
        )
    if triton := _triton(pairs):
        with torch.cuda.device_of(pairs.image):
            return triton.pair_gradients(pairs, scale, image_shift, text_shift, exclude_diagonal=exclude_diagonal)
    return tiled.pair_gradients(
        pairs.full_precision(), scale, image_shift, text_shift, exclude_diagonal=exclude_diagonal, tile_size=tile_size
    )


@section("similarities/gradients")
@torch.no_grad()
def pair_sigmoids(
    pairs: PairFeatures, scale: Tensor, bias: Tensor, *, tile_size: int = DEFAULT_TILE_SIZE
) -> SigmoidSums:
    """Loss and gradient rows of the sigmoid loss, before its factor 1/B. No communication.

    `scale` and `bias` one element each. One sweep on one process (three products of 2 B^2 d FLOPs, where autograd
    through dense logits takes three and keeps the matrices), two with several ranks.
    """
    if isinstance(pairs, RingPairs):
        return ring.sigmoids(pairs, lambda block: pair_sigmoids(block, scale, bias, tile_size=tile_size))
    if triton := _triton(pairs):
        with torch.cuda.device_of(pairs.image):
            return triton.pair_sigmoids(pairs, scale, bias)
    return sigmoid.pair_sigmoids(pairs.full_precision(), scale, bias, tile_size=tile_size)


def _triton(pairs: PairFeatures) -> ModuleType | None:
    """Triton's functions where they are chosen, else None. Loads Triton in the first case only."""
    if choose(SIMILARITIES, pairs.image).name != "triton":
        return None
    from neuclip_scale.similarity import triton_sweeps

    return triton_sweeps
