"""Triton kernels of an MLP's bias and GELU. Imported only where they run: see `fused`.

Memory's speed is the limit of both, so each number is read and written once: with the bias inside, and in the backward
pass with the bias's gradient, which would take another pass over the rows. Each output element has one program: no
atomics, the same bits every time.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from neuclip_scale.similarity.triton_kernels import LOG2E

SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)


@triton.jit
def _gelu(x, QUICK: tl.constexpr):
    """gelu(x) / x, and gelu'(x).

    The normal law's distribution is that of formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical
    Functions, off by at most 8e-8; its exponential is what the derivative needs too.
    """
    if QUICK:
        share = 1.0 / (1.0 + tl.exp2(x * (-1.702 * LOG2E)))
        return share, share + 1.702 * x * share * (1.0 - share)
    bell = tl.exp2(x * x * (-0.5 * LOG2E))
    t = 1.0 / (1.0 + (0.3275911 * SQRT_HALF) * tl.abs(x))
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail *= 0.5 * bell
    share = tl.where(x < 0, tail, 1.0 - tail)
    return share, share + x * bell * NORMAL


@triton.jit
def gelu_kernel(out, x, bias, num_rows, width, QUICK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = gelu(x + bias), [num_rows, width]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows[:, None] * width + columns[None, :]
    there = (rows < num_rows)[:, None] & (columns < width)[None, :]
    shift = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + shift[None, :]
    share, _ = _gelu(value, QUICK)
    tl.store(out + at, (value * share).to(out.dtype.element_ty), mask=there)


@triton.jit
def gelu_backward_kernel(
    dx, sums, dout, x, bias, num_rows, width, chunk_rows,
    QUICK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dout gelu'(x + bias), and sums [chunks, width], dx's over each chunk of rows, before it is rounded."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    shift = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = chunk * chunk_rows
    for start in tl.range(begin, min(begin + chunk_rows, num_rows), BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        there = (rows < num_rows)[:, None] & (columns < width)[None, :]
        value = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + shift[None, :]
        slope = tl.load(dout + at, mask=there, other=0.0).to(tl.float32)
        _, derivative = _gelu(value, QUICK)
        slope *= derivative
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=there)
        total += slope
    tl.store(sums + chunk.to(tl.int64) * width + columns, tl.sum(total, 0), mask=columns < width)
