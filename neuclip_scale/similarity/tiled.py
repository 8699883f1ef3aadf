"""Row log-sum-exps and feature gradients of all pair similarities, tile by tile.

Memory is O((b + B) d + tile_size^2) instead of [b, B]. Tiles are computed once for the statistics and once more for
the gradients. When this rank holds all pairs, one sweep serves both directions: 4 products of 2 B^2 d FLOPs in all,
against 6 for autograd through a dense loss that computes each direction's logits. With several ranks each direction
has its own sweep over [b, B] (8 products of 2 b B d), which needs no collective in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from neuclip_scale.similarity.pairs import PairFeatures

DEFAULT_TILE_SIZE = 1024


class TileOptions(TypedDict):
    """Keyword arguments of `similarity_tiles`."""

    tile_size: int
    offset: int
    exclude_diagonal: bool


class Tile(NamedTuple):
    """scale * left[rows] @ right[columns].T; the buffer is overwritten by the next tile."""

    rows: slice
    columns: slice
    logits: Tensor


def similarity_tiles(
    left: Tensor, right: Tensor, scale: Tensor, *, tile_size: int, offset: int = 0, exclude_diagonal: bool = False
) -> Iterator[Tile]:
    """Yield the tiles of scale * left @ right.T for left [l, d], right [r, d].

    Row i of `left` pairs with row offset + i of `right`; `exclude_diagonal` sets those entries to -inf.
    """
    num_left, num_right = left.shape[0], right.shape[0]
    buffer = left.new_empty(min(tile_size, num_left) * min(tile_size, num_right))
    for first in range(0, num_left, tile_size):
        rows = slice(first, min(first + tile_size, num_left))
        scaled = left[rows] * scale
        for start in range(0, num_right, tile_size):
            columns = slice(start, min(start + tile_size, num_right))
            height, width = rows.stop - rows.start, columns.stop - columns.start
            logits = buffer[: height * width].view(height, width)
            torch.mm(scaled, right[columns].T, out=logits)
            shift = offset + rows.start - columns.start  # entry (r, r + shift) of the tile is a positive pair
            if exclude_diagonal and -height < shift < width:
                logits.diagonal(shift).fill_(-torch.inf)
            yield Tile(rows, columns, logits)


@torch.no_grad()
def pair_logsumexp(
    pairs: PairFeatures, scale: Tensor, *, exclude_diagonal: bool, tile_size: int = DEFAULT_TILE_SIZE
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(scale s_ij) for this rank's images over all texts, and for its texts over all images.

    `scale` is 1/tau, one element. Returns (image_rows [b], text_rows [b]). With `exclude_diagonal` the sums leave out
    the positive pair. No communication.
    """
    options = TileOptions(tile_size=tile_size, exclude_diagonal=exclude_diagonal, offset=pairs.offset)
    if pairs.is_whole:
        return _logsumexp_sweep(pairs.image, pairs.text, scale, columns_too=True, **options)
    image_rows, _ = _logsumexp_sweep(pairs.image, pairs.world_text, scale, columns_too=False, **options)
    text_rows, _ = _logsumexp_sweep(pairs.text, pairs.world_image, scale, columns_too=False, **options)
    return image_rows, text_rows


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

    With G_ij = exp(scale s_ij - image_shift_i) + exp(scale s_ij - text_shift_j), i an image and j a text of the
    world, returns sum_j G_ij T_j for this rank's images and sum_i G_ij I_i for its texts, both [b, d]. The shifts
    [B] hold log-normalizers and all weights, so a weight costs nothing. With `exclude_diagonal` G_ii = 0. No
    communication.
    """
    options = TileOptions(tile_size=tile_size, exclude_diagonal=exclude_diagonal, offset=pairs.offset)
    if pairs.is_whole:
        return _gradient_sweep(pairs.image, pairs.text, scale, image_shift, text_shift, columns_too=True, **options)
    local_image, local_text = pairs.local_rows(image_shift), pairs.local_rows(text_shift)
    image, _ = _gradient_sweep(
        pairs.image, pairs.world_text, scale, local_image, text_shift, columns_too=False, **options
    )
    text, _ = _gradient_sweep(
        pairs.text, pairs.world_image, scale, local_text, image_shift, columns_too=False, **options
    )
    return image, text


def _logsumexp_sweep(
    left: Tensor, right: Tensor, scale: Tensor, *, columns_too: bool, **options: Unpack[TileOptions]
) -> tuple[Tensor, Tensor]:
    left_rows = left.new_full((left.shape[0],), -torch.inf)
    right_rows = right.new_full((right.shape[0],), -torch.inf)
    for rows, columns, logits in similarity_tiles(left, right, scale, **options):
        left_rows[rows] = torch.logaddexp(left_rows[rows], torch.logsumexp(logits, 1))
        if columns_too:
            right_rows[columns] = torch.logaddexp(right_rows[columns], torch.logsumexp(logits, 0))
    return left_rows, right_rows


def _gradient_sweep(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    left_shift: Tensor,
    right_shift: Tensor,
    *,
    columns_too: bool,
    **options: Unpack[TileOptions],
) -> tuple[Tensor, Tensor]:
    left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right) if columns_too else right[:0]
    for rows, columns, logits in similarity_tiles(left, right, scale, **options):
        weights = (logits - right_shift[columns]).exp_()
        weights += logits.sub_(left_shift[rows, None]).exp_()
        left_gradient[rows].addmm_(weights, right[columns])
        if columns_too:
            right_gradient[columns].addmm_(weights.T, left[rows])
    return left_gradient, right_gradient
