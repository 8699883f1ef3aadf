"""Row log-sum-exps and feature gradients through the Triton kernels. Imported only where Triton runs: see `choosing`.

Statistics take one product of a direction's [b, B] and store nothing square; on one process the same product serves
both directions. Gradients take it again, chunk by chunk: the weights G of at most `ChunkLimits.weight_bytes` are
written once and multiplied with the features of both sides. So on one process four products of 2 B^2 d FLOPs in all,
as in `tiled`. A kernel that kept its output rows' [block, d] sums in registers would need no chunk, but one sweep
for each direction, five products, and at d = 512 an accumulator as large as the register file.

Positive pairs never pass through the chunk: their weights are large and partly cancel outside, so they are computed in
fp32 from s_ii. Sums have a fixed order: the same sizes on the same kind of GPU give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neuclip_scale.similarity.chunks import Chunk, ChunkLimits, chunks
from neuclip_scale.similarity.pairs import PairFeatures
from neuclip_scale.similarity.sigmoid import SigmoidSums
from neuclip_scale.similarity.tiled import RowSums, Shifts
from neuclip_scale.similarity.triton_chunks import (
    Operands,
    Sums,
    add_product,
    chunk_exponentials,
    chunk_sigmoids,
    join_chunk,
)

LIMITS = ChunkLimits()


def pair_logsumexp(
    pairs: PairFeatures, scale: Tensor, *, exclude_diagonal: bool, limits: ChunkLimits = LIMITS
) -> tuple[Tensor, Tensor]:
    """See `dispatch.pair_logsumexp`."""
    sides = _operands(pairs)
    if pairs.is_whole:
        sums = Sums.empty(scale, pairs.global_size, pairs.global_size)
        _sums_sweep(sides.image, sums, scale, 0, exclude_diagonal, limits)
        assert sums.columns is not None
        return sums.rows, sums.columns
    image, text = (Sums.empty(scale, len(side.left)) for side in sides)
    for side, sums in zip(sides, (image, text), strict=True):
        _sums_sweep(side, sums, scale, pairs.offset, exclude_diagonal, limits)
    return image.rows, text.rows


def pair_row_sums(pairs: PairFeatures, scales: Tensor, *, limits: ChunkLimits = LIMITS) -> tuple[RowSums, RowSums]:
    """See `dispatch.pair_row_sums`."""
    found = []
    for operands, of_rows in zip(_operands(pairs), scales.T.contiguous(), strict=True):
        sums = Sums.empty(of_rows, len(of_rows), means=True)
        _sums_sweep(operands, sums, of_rows, pairs.offset, True, limits)
        assert sums.means is not None
        found.append(RowSums(sums.rows, sums.means))
    return found[0], found[1]


def pair_gradients(
    pairs: PairFeatures,
    scale: Tensor,
    image_shift: Tensor,
    text_shift: Tensor,
    *,
    exclude_diagonal: bool,
    limits: ChunkLimits = LIMITS,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.pair_gradients`."""
    sides = _operands(pairs)
    image = Shifts(image_shift.contiguous(), scale if scale.numel() == 1 else scale[:, 0].contiguous())
    text = Shifts(text_shift.contiguous(), scale if scale.numel() == 1 else scale[:, 1].contiguous())
    own_image, own_text = image.local(pairs), text.local(pairs)
    if pairs.is_whole:
        gradients = _gradient_sweep(sides.image, image, text, 0, True, limits)
    else:
        gradients = (
            _gradient_sweep(sides.image, own_image, text, pairs.offset, False, limits)[0],
            _gradient_sweep(sides.text, own_text, image, pairs.offset, False, limits)[0],
        )
    if not exclude_diagonal:
        s = pairs.positives()
        own = (own_image.scale * s - own_image.shift).exp() + (own_text.scale * s - own_text.shift).exp()
        gradients[0].addcmul_(own[:, None], pairs.text)
        gradients[1].addcmul_(own[:, None], pairs.image)
    return gradients


def pair_sigmoids(pairs: PairFeatures, scale: Tensor, bias: Tensor, *, limits: ChunkLimits = LIMITS) -> SigmoidSums:
    """See `dispatch.pair_sigmoids`."""
    sides = _operands(pairs)
    if pairs.is_whole:
        loss, weight, image, text = _sigmoid_sweep(sides.image, scale, bias, 0, True, limits)
    else:
        loss, weight, image, _ = _sigmoid_sweep(sides.image, scale, bias, pairs.offset, False, limits)
        _, _, text, _ = _sigmoid_sweep(sides.text, scale, bias, pairs.offset, False, limits)
    if not pairs.has_positives:
        return SigmoidSums(loss, weight, image, text)
    z = scale * pairs.positives() + bias
    own = -torch.sigmoid(-z)  # sigmoid(z) - 1, all digits of it
    image.addcmul_(own[:, None], pairs.text)
    text.addcmul_(own[:, None], pairs.image)
    return SigmoidSums(loss + torch.nn.functional.softplus(-z).sum(), weight + own.sum(), image, text)


class _Sides(NamedTuple):
    """What is multiplied for image rows and for text rows."""

    image: Operands
    text: Operands


def _operands(pairs: PairFeatures) -> _Sides:
    """Features as the tensor cores take them. fp32 ones obey `torch.set_float32_matmul_precision`: 3xTF32 for
    "highest", TF32 for "high", and for "medium" copies rounded to bf16."""
    precision = "ieee"
    of = [pairs.image, pairs.world_text, pairs.text, pairs.world_image]
    if pairs.image.dtype == torch.float32:
        wanted = torch.get_float32_matmul_precision()
        precision = {"highest": "tf32x3", "high": "tf32"}.get(wanted, "ieee")
        if wanted == "medium":
            of = [features.bfloat16() for features in of[:2]]
            of += of[1::-1] if pairs.is_whole else [pairs.text.bfloat16(), pairs.world_image.bfloat16()]
    image, world_text, text, world_image = [features.contiguous() for features in of]
    return _Sides(Operands(image, world_text, precision), Operands(text, world_image, precision))


def _sums_sweep(
    operands: Operands, sums: Sums, scale: Tensor, offset: int, exclude_diagonal: bool, limits: ChunkLimits
) -> Sums:
    """Join all entries to `sums`; `scale` one element, or one for each row where the sums have means."""
    num_rows, num_columns = len(operands.left), len(operands.right)
    for chunk in chunks(num_rows, num_columns, offset=offset, height=limits.edge, width=limits.edge):
        of_rows = scale if sums.means is None else scale[chunk.rows]
        join_chunk(sums.of(chunk), operands.of(chunk), of_rows, chunk.diagonal, exclude_diagonal=exclude_diagonal)
    return sums


def _gradient_sweep(
    operands: Operands, left: Shifts, right: Shifts, offset: int, columns_too: bool, limits: ChunkLimits
) -> tuple[Tensor, Tensor]:
    sums = _Gradients(operands, left.shift.dtype, columns_too, limits)
    for chunk in sums.chunks(offset):
        weights = sums.room(chunk.rows, chunk.columns)
        row = (left.scale if left.scale.numel() == 1 else left.scale[chunk.rows], left.shift[chunk.rows])
        column = (right.scale if right.scale.numel() == 1 else right.scale[chunk.columns], right.shift[chunk.columns])
        chunk_exponentials(operands.of(chunk), weights, row, column, chunk.diagonal)
        sums.add(chunk.rows, chunk.columns, weights)
    return sums.left, sums.right


def _sigmoid_sweep(
    operands: Operands, scale: Tensor, bias: Tensor, offset: int, columns_too: bool, limits: ChunkLimits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = _Gradients(operands, scale.dtype, columns_too, limits)
    loss, total = scale.new_zeros(()), scale.new_zeros(())
    for chunk in sums.chunks(offset):
        weights = sums.room(chunk.rows, chunk.columns)
        losses, values = chunk_sigmoids(operands.of(chunk), weights, scale, bias, chunk.diagonal)
        loss += losses
        total += values
        sums.add(chunk.rows, chunk.columns, weights)
    return loss, total, sums.left, sums.right


class _Gradients:
    """Sums of weights times features, over chunks of weights that share one piece of memory."""

    def __init__(self, operands: Operands, dtype: torch.dtype, columns_too: bool, limits: ChunkLimits) -> None:
        self.operands, self.limits, self.columns_too = operands, limits, columns_too
        left, right = operands.left, operands.right
        self.left = torch.zeros_like(left, dtype=dtype)
        self.right = torch.zeros_like(right, dtype=dtype) if columns_too else self.left[:0]
        self.height = min(limits.height, len(left))
        self.width = limits.weight_columns(self.height, operands.weight_dtype.itemsize)
        self._room = left.new_empty(self.height * min(self.width, len(right)), dtype=operands.weight_dtype)

    def chunks(self, offset: int) -> Iterator[Chunk]:
        """Cover all similarities."""
        num_left, num_right = len(self.operands.left), len(self.operands.right)
        return chunks(num_left, num_right, offset=offset, height=self.height, width=self.width)

    def room(self, rows: slice, columns: slice) -> Tensor:
        """[rows, columns] of the memory; the next chunk overwrites it."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return self._room[: height * width].view(height, width)

    def add(self, rows: slice, columns: slice, weights: Tensor) -> None:
        """Add a chunk's weights times the features of both sides."""
        left, right, precision = self.operands
        least = self.limits.split_depth
        add_product(self.left[rows], weights, right[columns], precision, transposed=False, least_depth=least)
        if self.columns_too:
            add_product(self.right[columns], weights, left[rows], precision, transposed=True, least_depth=least)
