"""Triton kernels over one chunk of similarities. Imported only where they run: see `choosing`.

Each program computes one tile of left @ right.T (tensor cores, fp32 accumulators) and what follows from it while the
tile is in registers. Every output element has one program, so nothing is atomic and the result does not depend on
scheduling. Exponentials are powers of two, with log2(e) in the scale. Indices are 32 bit and relative to the chunk.

Shapes: left [num_rows, d] and right [num_columns, d], row-major, `*_stride` elements from row to row.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of rows and of columns; GROUP blocks of rows share their columns, which stay in L2."""
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    group = program // (GROUP * blocks_n)
    height = min(blocks_m - group * GROUP, GROUP)
    within = program - group * GROUP * blocks_n
    return group * GROUP + within % height, within // height


@triton.jit
def _similarities(
    left, right, rows, columns, num_rows, num_columns, d, left_stride, right_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """left[rows] @ right[columns].T -> [BLOCK_M, BLOCK_N] fp32; rows past the end repeat others: loads need no mask."""
    inner = tl.arange(0, BLOCK_K)
    left_at = left + (rows % num_rows)[:, None] * left_stride + inner[None, :]
    right_at = right + (columns % num_columns)[None, :] * right_stride + inner[:, None]
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, d, BLOCK_K):
        if EVEN:
            a, b = tl.load(left_at), tl.load(right_at)
        else:
            a = tl.load(left_at, mask=inner[None, :] < d - start, other=0.0)
            b = tl.load(right_at, mask=inner[:, None] < d - start, other=0.0)
        if UPCAST:  # the interpreter has no bf16 product
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(a, b, tile, input_precision=PRECISION)
        left_at += BLOCK_K
        right_at += BLOCK_K
    return tile


@triton.jit
def _store_parts(parts, value, neutral, block, places, count, BLOCK: tl.constexpr, SLOT: tl.constexpr):
    """parts[slot, places] = value for the first of this block's slots, `neutral` for the others.

    A slot stands for SLOT rows or columns, the smallest block that may be tuned: the layout is the same for all.
    """
    slots: tl.constexpr = BLOCK // SLOT
    at = parts + block * slots * count + places
    tl.store(at, value, mask=places < count)
    for other in tl.static_range(1, slots):
        tl.store(at + other * count, tl.zeros_like(value) + neutral, mask=places < count)


@triton.jit
def _logsumexp2(logits, AXIS: tl.constexpr):
    """log2 of the sums of 2^logits, the largest entries they are taken relative to, and the terms; -inf for no term."""
    largest = tl.max(logits, AXIS)
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    terms = tl.exp2(logits - tl.expand_dims(finite, AXIS))
    total = tl.sum(terms, AXIS)
    empty = largest == -float("inf")
    return tl.where(empty, -float("inf"), finite + tl.log2(tl.where(empty, 1.0, total))), terms, total


@triton.jit(do_not_specialize=["diagonal"])
def sums_kernel(
    left, right, scale, row_parts, column_parts, mean_parts,
    num_rows, num_columns, d, left_stride, right_stride, diagonal,
    EXCLUDE: tl.constexpr, COLUMNS: tl.constexpr, INDIVIDUAL: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLOT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of scale * left @ right.T over each block's columns, and with COLUMNS over its rows.

    row_parts [slots of columns, num_rows], column_parts [slots of rows, num_columns]. INDIVIDUAL: `scale` [num_rows],
    and mean_parts, laid out like row_parts, gets the mean logit under each block's softmax. EXCLUDE leaves out the
    entries (r, r + diagonal).
    """
    block_m, block_n = _place(num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _similarities(
        left, right, rows, columns, num_rows, num_columns, d, left_stride, right_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    if INDIVIDUAL:
        tile *= (tl.load(scale + rows, mask=rows < num_rows, other=1.0) * LOG2E)[:, None]
    else:
        tile *= tl.load(scale) * LOG2E
    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if EXCLUDE:
        counted &= columns[None, :] != rows[:, None] + diagonal
    tile = tl.where(counted, tile, -float("inf"))
    sums, terms, total = _logsumexp2(tile, 1)
    _store_parts(row_parts, sums * LN2, -float("inf"), block_n, rows, num_rows, BLOCK_N, SLOT)
    if INDIVIDUAL:
        weighted = tl.sum(terms * tl.where(counted, tile, 0.0), 1) / tl.where(total == 0.0, 1.0, total)
        _store_parts(mean_parts, weighted * LN2, 0.0, block_n, rows, num_rows, BLOCK_N, SLOT)
    if COLUMNS:
        sums, _, _ = _logsumexp2(tile, 0)
        _store_parts(column_parts, sums * LN2, -float("inf"), block_m, columns, num_columns, BLOCK_M, SLOT)


@triton.jit
def join_kernel(sums, parts, num_parts, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[i] = log(exp(sums[i]) + sum over p of exp(parts[p, i])); parts [num_parts, count]."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = places < count
    largest = tl.load(sums + places, mask=there, other=-float("inf"))
    total = tl.where(largest == -float("inf"), 0.0, 1.0)
    for first in range(0, num_parts, PARTS):
        of = first + tl.arange(0, PARTS)
        mask = (of < num_parts)[:, None] & there[None, :]
        part = tl.load(parts + of[:, None] * count + places[None, :], mask=mask, other=-float("inf"))
        above = tl.maximum(largest, tl.max(part, 0))
        finite = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(part - finite[None, :]), 0)
        largest = above
    empty = largest == -float("inf")
    tl.store(sums + places, tl.where(empty, largest, largest + tl.log(tl.where(empty, 1.0, total))), mask=there)


@triton.jit(do_not_specialize=["diagonal"])
def exponentials_kernel(
    left, right, weights, row_scale, column_scale, row_shift, column_shift,
    num_rows, num_columns, d, left_stride, right_stride, weights_stride, diagonal,
    INDIVIDUAL: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weights[r, c] = exp(k_r s_rc - row_shift_r) + exp(l_c s_rc - column_shift_c), 0 where c = r + diagonal.

    row_scale holds k: one element, which is l too, or with INDIVIDUAL [num_rows] beside column_scale [num_columns].
    """
    block_m, block_n = _place(num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _similarities(
        left, right, rows, columns, num_rows, num_columns, d, left_stride, right_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    row_minus = tl.load(row_shift + rows, mask=rows < num_rows, other=0.0) * LOG2E
    column_minus = tl.load(column_shift + columns, mask=columns < num_columns, other=0.0) * LOG2E
    if INDIVIDUAL:
        k = tl.load(row_scale + rows, mask=rows < num_rows, other=0.0) * LOG2E
        l = tl.load(column_scale + columns, mask=columns < num_columns, other=0.0) * LOG2E  # noqa: E741
        values = tl.exp2(tile * k[:, None] - row_minus[:, None]) + tl.exp2(tile * l[None, :] - column_minus[None, :])
    else:
        tile *= tl.load(row_scale) * LOG2E
        values = tl.exp2(tile - row_minus[:, None]) + tl.exp2(tile - column_minus[None, :])
    values = tl.where(columns[None, :] == rows[:, None] + diagonal, 0.0, values)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = weights + rows[:, None] * weights_stride + columns[None, :]
    tl.store(at, values.to(weights.dtype.element_ty), mask=there)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], to 2e-7 of its value however small x is: x times a polynomial of degree 8, fitted by
    least squares at Chebyshev's points. A logarithm of 1 + x would lose all digits of x < 6e-8.
    """
    y = 0.005253457929939032 * x - 0.02958850748836994
    y = y * x + 0.07836166769266129
    y = y * x - 0.13674770295619965
    y = y * x + 0.19111430644989014
    y = y * x - 0.24844369292259216
    y = y * x + 0.33319270610809326
    y = y * x - 0.49999502301216125
    return (y * x + 1.0) * x


@triton.jit(do_not_specialize=["diagonal"])
def sigmoids_kernel(
    left, right, weights, loss_parts, weight_parts, scale, bias,
    num_rows, num_columns, d, left_stride, right_stride, weights_stride, diagonal,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLOT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weights = sigmoid(z), z = scale s + bias, 0 where c = r + diagonal; also sums of softplus(z) and of sigmoid(z).

    loss_parts and weight_parts [slots of columns, num_rows] hold the sums over each block's columns.
    """
    block_m, block_n = _place(num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _similarities(
        left, right, rows, columns, num_rows, num_columns, d, left_stride, right_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    z = tile * tl.load(scale) + tl.load(bias)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    # -inf makes both softplus and sigmoid 0.
    z = tl.where(there & (columns[None, :] != rows[:, None] + diagonal), z, -float("inf"))
    small = tl.exp2(-tl.abs(z) * LOG2E)
    softplus = tl.maximum(z, 0.0) + _log1p(small)  # near 2e-9 for most negatives
    _store_parts(loss_parts, tl.sum(softplus, 1), 0.0, block_n, rows, num_rows, BLOCK_N, SLOT)
    values = tl.where(z >= 0.0, 1.0, small) / (1.0 + small)
    _store_parts(weight_parts, tl.sum(values, 1), 0.0, block_n, rows, num_rows, BLOCK_N, SLOT)
    at = weights + rows[:, None] * weights_stride + columns[None, :]
    tl.store(at, values.to(weights.dtype.element_ty), mask=there)


@triton.jit
def _multiplied(
    total, left_at, left_step, factors_at, right_at, right_step, first, stop,
    SCALED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + left @ right over the places from `first` to `stop`, whole blocks of them where EVEN.

    SCALED: left's columns times `factors`, which are contiguous, rounded to right's type; else right is rounded to
    left's.
    """
    for start in range(first, stop, BLOCK_K):
        if EVEN:
            a, b = tl.load(left_at), tl.load(right_at)
            if SCALED:
                f = tl.load(factors_at)
        else:
            left = tl.arange(0, BLOCK_K) < stop - start
            a = tl.load(left_at, mask=left[None, :], other=0.0)
            b = tl.load(right_at, mask=left[:, None], other=0.0)
            if SCALED:
                f = tl.load(factors_at, mask=left, other=0.0)
        if SCALED:
            a = (a.to(tl.float32) * f[None, :]).to(b.dtype)
        else:
            b = b.to(a.dtype)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_at += BLOCK_K * left_step
        if SCALED:
            factors_at += BLOCK_K
        right_at += BLOCK_K * right_step
    return total


@triton.jit
def product_kernel(
    out, weights, features,
    num_rows, depth, d, split_depth, out_stride, split_stride, weights_stride, features_stride,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split] (+)= weights @ features, fp32; with TRANSPOSED weights.T @ features.

    weights [num_rows, depth], or [depth, num_rows] where TRANSPOSED; features [depth, d]. Program axis 1 counts the
    splits of the sum over `depth`; with ADD there is one, which adds to what `out` holds. The features are rounded to
    the weights' type: fp16 features meet bf16 weights, whose range fp16 has not. EVEN: every split is whole blocks.
    """
    block_m, block_n = _place(num_rows, d, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * split_depth
    stop = min(first + split_depth, depth)
    inner = first + tl.arange(0, BLOCK_K)
    row_step = 1 if TRANSPOSED else weights_stride
    inner_step = weights_stride if TRANSPOSED else 1
    weights_at = weights + (rows % num_rows)[:, None] * row_step + inner[None, :] * inner_step
    features_at = features + inner[:, None] * features_stride + (columns % d)[None, :]
    there = (rows < num_rows)[:, None] & (columns < d)[None, :]
    at = out + split * split_stride + rows[:, None] * out_stride + columns[None, :]
    # Added to here rather than at the end, where the accumulator leaves no registers for it.
    if ADD:  # noqa: SIM108
        total = tl.load(at, mask=there, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _multiplied(
        total, weights_at, inner_step, weights_at, features_at, features_stride, first, stop,
        False, EVEN, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip
    tl.store(at, total, mask=there)
