"""Row log-sum-exps and feature gradients of all pair similarities, tile by tile.

Memory is O((b + B) d + tile_size^2) instead of [b, B]. Tiles are computed once for the statistics and once more for
the gradients. When this rank holds all pairs, one sweep serves both directions: 4 products of 2 B^2 d FLOPs in all,
against 6 for autograd through a dense loss that computes each direction's logits. With several ranks each direction
has its own sweep over [b, B] (6 products of 2 b B d), which needs no collective in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from neuclip_scale.similarity.pairs import BatchShape, PairFeatures

DEFAULT_TILE_SIZE = 1024
LARGEST_TILE_ON_CPU = 512
"""Larger ones are no faster there and take four times the memory."""


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
    """Yield the tiles of scale * left @ right.T for left [l, d], right [r, d]; scale one element or [l, 1].

    `tile_size` is the largest edge; on a CPU `LARGEST_TILE_ON_CPU` is one too.
    Row i of `left` pairs with row offset + i of `right`; `exclude_diagonal` sets those entries to -inf.
    """
    num_left, num_right = left.shape[0], right.shape[0]
    tile_size = tile_edge(left, tile_size)
    buffer = left.new_empty(min(tile_size, num_left) * min(tile_size, num_right))
    for first in range(0, num_left, tile_size):
        rows = slice(first, min(first + tile_size, num_left))
        scaled = left[rows] * (scale if scale.numel() == 1 else scale[rows])
        for start in range(0, num_right, tile_size):
            columns = slice(start, min(start + tile_size, num_right))
            height, width = rows.stop - rows.start, columns.stop - columns.start
            logits = buffer[: height * width].view(height, width)
            torch.mm(scaled, right[columns].T, out=logits)
            shift = offset + rows.start - columns.start  # entry (r, r + shift) of the tile is a positive pair
            if exclude_diagonal and -height < shift < width:
                logits.diagonal(shift).fill_(-torch.inf)
            yield Tile(rows, columns, logits)


def tile_edge(features: Tensor, tile_size: int) -> int:
    """The edge that `similarity_tiles` gives its tiles."""
    return min(tile_size, LARGEST_TILE_ON_CPU) if features.device.type == "cpu" else tile_size


class RowSums(NamedTuple):
    """Statistics of each row of logits, both [b]."""

    logsumexp: Tensor
    mean: Tensor
    """Mean logit under the row's softmax; the derivative of log sum_j exp(k x_j) with respect to log k."""


@torch.no_grad()
def pair_logsumexp(
    pairs: PairFeatures, scale: Tensor, *, exclude_diagonal: bool, tile_size: int = DEFAULT_TILE_SIZE
) -> tuple[Tensor, Tensor]:
    """See `dispatch.pair_logsumexp`."""
    options = TileOptions(tile_size=tile_size, exclude_diagonal=exclude_diagonal, offset=pairs.offset)
    if pairs.is_whole:
        return _logsumexp_sweep(pairs.image, pairs.text, scale, columns_too=True, **options)
    image_rows, _ = _logsumexp_sweep(pairs.image, pairs.world_text, scale, columns_too=False, **options)
    text_rows, _ = _logsumexp_sweep(pairs.text, pairs.world_image, scale, columns_too=False, **options)
    return image_rows, text_rows


@torch.no_grad()
def pair_row_sums(
    pairs: PairFeatures, scales: Tensor, *, tile_size: int = DEFAULT_TILE_SIZE
) -> tuple[RowSums, RowSums]:
    """See `dispatch.pair_row_sums`."""
    options = TileOptions(tile_size=tile_size, exclude_diagonal=True, offset=pairs.offset)
    image = _row_sums_sweep(pairs.image, pairs.world_text, scales[:, :1], **options)
    return image, _row_sums_sweep(pairs.text, pairs.world_image, scales[:, 1:], **options)


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
    """See `dispatch.pair_gradients`."""
    options = TileOptions(tile_size=tile_size, exclude_diagonal=exclude_diagonal, offset=pairs.offset)
    image = Shifts(image_shift, scale if scale.numel() == 1 else scale[:, 0])
    text = Shifts(text_shift, scale if scale.numel() == 1 else scale[:, 1])
    if pairs.is_whole:
        return _gradient_sweep(pairs.image, pairs.text, image, text, columns_too=True, **options)
    image_gradient, _ = _gradient_sweep(
        pairs.image, pairs.world_text, image.local(pairs), text, columns_too=False, **options
    )
    text_gradient, _ = _gradient_sweep(
        pairs.text, pairs.world_image, text.local(pairs), image, columns_too=False, **options
    )
    return image_gradient, text_gradient


def pair_logsumexp_flops(shape: BatchShape) -> int:
    """FLOPs of `pair_logsumexp` on one rank: one product serves both directions where it holds all pairs."""
    return shape.products(1 if shape.is_whole else 2)


def pair_row_sums_flops(shape: BatchShape) -> int:
    """FLOPs of `pair_row_sums` on one rank: a product for each direction."""
    return shape.products(2)


def pair_gradients_flops(shape: BatchShape) -> int:
    """FLOPs of `pair_gradients` on one rank: the logits again and two gradients, or both of these per direction."""
    return shape.products(3 if shape.is_whole else 4)


class Shifts(NamedTuple):
    """What the exponentials of one side's rows are made with."""

    shift: Tensor  # [rows]
    scale: Tensor  # [1] or [rows]

    def local(self, pairs: PairFeatures) -> Shifts:
        """Those of this rank's rows."""
        scale = self.scale if self.scale.numel() == 1 else pairs.local_rows(self.scale)
        return Shifts(pairs.local_rows(self.shift), scale)


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


def _row_sums_sweep(left: Tensor, right: Tensor, scale: Tensor, **options: Unpack[TileOptions]) -> RowSums:
    total = left.new_full((left.shape[0],), -torch.inf)
    mean = torch.zeros_like(total)
    for rows, _, logits in similarity_tiles(left, right, scale, **options):
        tile = torch.logsumexp(logits, 1)
        joined = torch.logaddexp(total[rows], tile)
        # Excluded entries weigh exp(-inf) = 0, but 0 * -inf has no value, nor has -inf - -inf in a row of one pair.
        finite = joined.clamp_min(torch.finfo(joined.dtype).min)
        weights = (logits - finite[:, None]).exp_()
        weighted = weights.mul_(logits.masked_fill_(logits == -torch.inf, 0.0)).sum(1)
        mean[rows] = mean[rows] * (total[rows] - finite).exp() + weighted
        total[rows] = joined
    return RowSums(total, mean)


def _gradient_sweep(
    left: Tensor,
    right: Tensor,
    left_side: Shifts,
    right_side: Shifts,
    *,
    columns_too: bool,
    **options: Unpack[TileOptions],
) -> tuple[Tensor, Tensor]:
    left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right) if columns_too else right[:0]
    # One scale for all rows goes into the product; else the tiles hold bare similarities.
    one_scale = left_side.scale.numel() == right_side.scale.numel() == 1
    scale = left_side.scale if one_scale else left.new_ones(1)
    for rows, columns, logits in similarity_tiles(left, right, scale, **options):
        if one_scale:
            weights = (logits - right_side.shift[columns]).exp_()
        else:
            weights = (logits * right_side.scale[columns]).sub_(right_side.shift[columns]).exp_()
            logits.mul_(left_side.scale[rows, None])
        weights += logits.sub_(left_side.shift[rows, None]).exp_()
        left_gradient[rows].addmm_(weights, right[columns])
        if columns_too:
            right_gradient[columns].addmm_(weights.T, left[rows])
    return left_gradient, right_gradient
