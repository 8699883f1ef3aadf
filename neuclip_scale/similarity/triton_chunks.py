"""One chunk of similarities through the Triton kernels. Imported only where Triton runs: see `choosing`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuclip_scale.similarity.chunks import Chunk, num_splits
from neuclip_scale.similarity.triton_blocks import EVEN_BLOCK, INTERPRETED, LARGEST, SLOT, launch
from neuclip_scale.similarity.triton_kernels import join_kernel


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
    """Running sums of some rows over all columns so far, and of some columns over all rows; chunks join them."""

    rows: Tensor  # [rows], log-sum-exp; starts at -inf
    columns: Tensor | None = None  # [columns], log-sum-exp
    means: Tensor | None = None  # [rows], mean logit under the row's softmax; starts at 0

    @classmethod
    def empty(cls, like: Tensor, num_rows: int, num_columns: int | None = None, *, means: bool = False) -> Sums:
        """Of no entry yet; without columns if there is no number of them."""
        return cls(
            like.new_full((num_rows,), -torch.inf),
            None if num_columns is None else like.new_full((num_columns,), -torch.inf),
            like.new_zeros(num_rows) if means else None,
        )

    def of(self, chunk: Chunk) -> Sums:
        """Those of a chunk's rows and columns, sharing their memory."""
        return Sums(
            self.rows[chunk.rows],
            None if self.columns is None else self.columns[chunk.columns],
            None if self.means is None else self.means[chunk.rows],
        )


def join_chunk(sums: Sums, operands: Operands, scale: Tensor, diagonal: int, *, exclude_diagonal: bool) -> None:
    """Join the chunk's entries scale * left @ right.T to `sums`; `scale` one element, or [rows] for sums with means."""
    num_rows, num_columns = len(operands.left), len(operands.right)
    individual, columns_too = sums.means is not None, sums.columns is not None
    row_parts = _parts(scale, num_columns, num_rows, -torch.inf)
    mean_parts = torch.zeros_like(row_parts) if individual else row_parts
    column_parts = _parts(scale, num_rows, num_columns, -torch.inf) if columns_too else row_parts
    _launch_tiles(
        "sums_kernel", operands, [scale, row_parts, column_parts, mean_parts], diagonal=diagonal,
        EXCLUDE=exclude_diagonal, COLUMNS=columns_too, INDIVIDUAL=individual, SLOT=SLOT,
    )  # fmt: skip
    if sums.means is not None:
        _join_means(sums.means, sums.rows, row_parts, mean_parts)
    join_parts(sums.rows, row_parts)
    if sums.columns is not None:
        join_parts(sums.columns, column_parts)


def _join_means(means: Tensor, before: Tensor, row_parts: Tensor, mean_parts: Tensor) -> None:
    """The parts' means and the one before, each weighted with its share of the row's sum."""
    after = torch.logaddexp(before, torch.logsumexp(row_parts, 0))
    after = after.clamp_min_(torch.finfo(after.dtype).min)  # a row without entries has no share to divide
    means *= (before - after).exp_()
    means += (mean_parts * (row_parts - after).exp_()).sum(0)


def join_parts(sums: Tensor, parts: Tensor) -> None:
    """sums [count] = log-sum-exp of itself and parts [num_parts, count], in one pass over memory."""
    num_parts, count = parts.shape
    sizes = {"PARTS": 16, "BLOCK": 16} if INTERPRETED else {"PARTS": 64, "BLOCK": 64}
    join_kernel[(-(-count // sizes["BLOCK"]),)](sums, parts, num_parts, count, **sizes)


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
    """out [rows, d] += weights @ features, or weights.T @ features where `transposed`; fp32 accumulators.

    cuBLAS does it for halves, faster than our kernel, where torch lets it add to fp32.
    """
    if _by_cublas(out.device, weights.dtype):
        factor = weights.T if transposed else weights
        torch.addmm(out, factor, features.to(weights.dtype), out_dtype=torch.float32, out=out)
        return
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


def _by_cublas(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` leaves these weights to cuBLAS, which keeps its own counsel about the order of sums."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return device.type == "cuda" and dtype.itemsize == 2 and not deterministic and _adds_to_fp32(device, dtype)


@cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch (2.8 or newer) multiplies `dtype` and adds to fp32."""
    factor = torch.zeros(16, 16, device=device, dtype=dtype)
    out = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, factor, factor, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):
        return False
    return True


def _launch_tiles(
    name: str, operands: Operands, tensors: list[Tensor], *strides: int, diagonal: int, **flags: Any
) -> None:
    left, right, precision = operands
    num_rows, d = left.shape
    # Of the features, and of the weights [rows, columns], whose stride is as long as a row of few rows is wide.
    assert max(num_rows * left.stride(0), len(right) * right.stride(0), num_rows * max(strides, default=0)) < 1 << 31
    launch(
        name, left.element_size(), (num_rows, len(right), 1), min(num_rows, len(right)),
        left, right, *tensors, num_rows, len(right), d, left.stride(0), right.stride(0), *strides, diagonal,
        EVEN=d % EVEN_BLOCK == 0, PRECISION=precision, **flags,
    )  # fmt: skip


def _parts(like: Tensor, num_summed: int, num_kept: int, neutral: float) -> Tensor:
    """Room for a number of each of `num_kept` rows and SLOT columns, to the end of the largest block's last one."""
    slots = -(-num_summed // LARGEST) * (LARGEST // SLOT)
    if num_summed % LARGEST == 0:  # every block writes all of its slots
        return like.new_empty((slots, num_kept))
    return like.new_full((slots, num_kept), neutral)
