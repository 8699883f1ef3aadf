"""One chunk of similarities through the Triton kernels. Imported only where Triton runs: see `choosing`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuclip_scale.similarity.chunks import Chunk, num_splits
from neuclip_scale.similarity.triton_blocks import EVEN_BLOCK, LARGEST, SLOT, launch


class Operands(NamedTuple):
    """Features of two sides as the tensor cores take them; bf16, fp16 or fp32, rows contiguous."""

    left: Tensor  # [l, d]
    right: Tensor  # [r, d]
    precision: str
    """How fp32 is multiplied: "ieee", "tf32x3" (nearly fp32, on tensor cores), "tf32"."""

    def of(self, chunk: Chunk) -> Operands:
        """The chunk's rows of both; what the kernels index from."""
        return Operands(self.left[chunk.rows], self.right[chunk.columns], self.precision)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of exp and sigmoid values in memory: bf16 for both halves, since those of many pairs underflow in fp16."""
        return torch.float32 if self.left.dtype == torch.float32 else torch.bfloat16


class Sums(NamedTuple):
    """Of a chunk's rows, and of its columns where asked for."""

    rows: Tensor  # [rows], log-sum-exp
    means: Tensor | None  # [rows], mean logit under the row's softmax
    columns: Tensor | None  # [columns], log-sum-exp


def chunk_sums(operands: Operands, scale: Tensor, diagonal: int, *, exclude_diagonal: bool, columns_too: bool) -> Sums:
    """Log-sum-exps of scale * left @ right.T; `scale` one element, or [rows], which gives the means too."""
    num_rows, num_columns = len(operands.left), len(operands.right)
    individual = scale.numel() > 1
    row_parts = _parts(scale, num_columns, num_rows, -torch.inf)
    mean_parts = torch.zeros_like(row_parts) if individual else row_parts
    column_parts = _parts(scale, num_rows, num_columns, -torch.inf) if columns_too else row_parts
    _launch_tiles(
        "sums_kernel", operands, [scale, row_parts, column_parts, mean_parts], diagonal=diagonal,
        EXCLUDE=exclude_diagonal, COLUMNS=columns_too, INDIVIDUAL=individual, SLOT=SLOT,
    )  # fmt: skip
    rows = torch.logsumexp(row_parts, 0)
    means = None
    if individual:  # a row without entries has no share to divide
        shares = (row_parts - rows.clamp_min(torch.finfo(rows.dtype).min)).exp_()
        means = (mean_parts * shares).sum(0)
    return Sums(rows, means, torch.logsumexp(column_parts, 0) if columns_too else None)


def chunk_exponentials(
    operands: Operands, weights: Tensor, row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor], diagonal: int
) -> None:
    """Fill `weights` [rows, columns] with exp(k_r s_rc - x_r) + exp(l_c s_rc - y_c), without the positive pairs.

    `row` is (k, x), `column` (l, y); k and l are the same element or one for each row and column.
    """
    _launch_tiles(
        "exponentials_kernel", operands, [weights, row[0], column[0], row[1], column[1]], weights.stride(0),
        diagonal=diagonal, INDIVIDUAL=row[0].numel() > 1 or column[0].numel() > 1,
    )  # fmt: skip


def chunk_sigmoids(
    operands: Operands, weights: Tensor, scale: Tensor, bias: Tensor, diagonal: int
) -> tuple[Tensor, Tensor]:
    """Fill `weights` [rows, columns] with sigmoid(scale s + bias); sums of softplus and sigmoid, no positive pairs."""
    loss_parts = _parts(scale, len(operands.right), len(operands.left), 0.0)
    weight_parts = torch.zeros_like(loss_parts)
    _launch_tiles(
        "sigmoids_kernel", operands, [weights, loss_parts, weight_parts, scale, bias], weights.stride(0),
        diagonal=diagonal, SLOT=SLOT,
    )  # fmt: skip
    return loss_parts.sum(), weight_parts.sum()


def add_product(
    out: Tensor, weights: Tensor, features: Tensor, precision: str, *, transposed: bool, least_depth: int
) -> None:
    """out [rows, d] += weights @ features, or weights.T @ features where `transposed`; fp32 accumulators."""
    num_rows, d = out.shape
    depth = len(features)
    tiles = -(-num_rows // EVEN_BLOCK) * -(-d // EVEN_BLOCK)
    splits = num_splits(tiles, depth, least_depth)
    split_depth = -(-depth // (splits * EVEN_BLOCK)) * EVEN_BLOCK if splits > 1 else depth
    splits = -(-depth // split_depth)
    target = out if splits == 1 else out.new_empty(splits, num_rows, d)
    launch(
        "product_kernel", weights.element_size(), (num_rows, d, splits), min(num_rows, depth),
        target, weights, features, num_rows, depth, d, split_depth,
        target.stride(-2), target.stride(0), weights.stride(0), features.stride(0),
        TRANSPOSED=transposed, ADD=splits == 1,
        EVEN=depth % EVEN_BLOCK == 0 and split_depth % EVEN_BLOCK == 0, PRECISION=precision,
    )  # fmt: skip
    if splits > 1:
        out += target.sum(0)


def _launch_tiles(
    name: str, operands: Operands, tensors: list[Tensor], *strides: int, diagonal: int, **flags: Any
) -> None:
    left, right, precision = operands
    num_rows, d = left.shape
    assert max(num_rows, len(right)) * max(d, *strides, left.stride(0), right.stride(0)) < 1 << 31
    launch(
        name, left.element_size(), (num_rows, len(right), 1), min(num_rows, len(right)),
        left, right, *tensors, num_rows, len(right), d, left.stride(0), right.stride(0), *strides, diagonal,
        EVEN=d % EVEN_BLOCK == 0, PRECISION=precision, **flags,
    )  # fmt: skip


def _parts(like: Tensor, num_summed: int, num_kept: int, neutral: float) -> Tensor:
    """Room for a number of each of `num_kept` rows and SLOT columns, to the end of the largest block's last one."""
    slots = -(-num_summed // LARGEST) * (LARGEST // SLOT)
    return like.new_full((slots, num_kept), neutral)
