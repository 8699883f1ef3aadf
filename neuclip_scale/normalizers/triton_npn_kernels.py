"""Triton kernels of the NPN's updates. Imported only where they run: see `choosing`.

An update takes two products. `weigh_kernel` writes every exponential once, relative to the largest of its anchor's
logits in one block of prototypes, so that nothing waits for the whole row; `factors_kernel` joins the blocks and leaves
for each anchor and block the number that makes those exponentials the gradient's coefficients; `pull_kernel` multiplies
by it on the way to the tensor cores. Each output element has one program: no atomics, the same bits every time.

Shapes: anchors [b, d], directions [m, d], weights [m, b] (the sum over anchors is then along a row), largest, sums and
factors [blocks of prototypes, b]. Logits in here are in powers of two.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from neuclip_scale.similarity.triton_kernels import LN2, LOG2E, _multiplied, _place, _similarities


@triton.jit
def weigh_kernel(
    anchors, directions, weights, largest, sums, scale, sample_index, prototype_index,
    num_anchors, num_prototypes, d, weights_stride,
    OWN: tl.constexpr, STORE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weights[k, i] = exp(logit_ik - largest of i's in the block of k), with OWN 0 where the indices agree; and sums.

    Without STORE `weights` stays as it is. An anchor without a logit in a block has -inf and 0 there.
    """
    block_m, block_n = _place(num_anchors, num_prototypes, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _similarities(
        anchors, directions, rows, columns, num_anchors, num_prototypes, d, d, d,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    tile *= tl.load(scale) * LOG2E
    counted = (columns < num_prototypes)[None, :]
    if OWN:
        mine = tl.load(sample_index + rows, mask=rows < num_anchors, other=0)
        origin = tl.load(prototype_index + columns, mask=columns < num_prototypes, other=0)
        counted = counted & (mine[:, None] != origin[None, :])
    tile = tl.where(counted, tile, -float("inf"))
    top = tl.max(tile, 1)
    terms = tl.exp2(tile - tl.where(top == -float("inf"), 0.0, top)[:, None])
    at = block_n * num_anchors + rows
    tl.store(largest + at, top, mask=rows < num_anchors)
    tl.store(sums + at, tl.sum(terms, 1), mask=rows < num_anchors)
    if STORE:
        there = (rows < num_anchors)[:, None] & (columns < num_prototypes)[None, :]
        weights_at = weights + columns[None, :] * weights_stride + rows[:, None]
        tl.store(weights_at, terms.to(weights.dtype.element_ty), mask=there)


@triton.jit
def factors_kernel(
    largest, sums, shift, target, predicted, scale, log_eps, share, num_anchors, num_blocks,
    PREDICT: tl.constexpr, ANCHORS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Join the blocks: with PREDICT predicted [b] = log(eps + exp(log-sum-exp + shift)), else factors over `largest`.

    factor = share scale (1 - exp(target - a)) exp(largest in block + shift - a); 0 for an anchor without a logit.
    """
    anchors = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    some = tl.arange(0, BLOCKS)
    there = (anchors < num_anchors)[None, :]
    top = tl.full((ANCHORS,), -float("inf"), tl.float32)
    total = tl.zeros((ANCHORS,), tl.float32)
    for first in range(0, num_blocks, BLOCKS):
        at = (first + some)[:, None] * num_anchors + anchors[None, :]
        mask = (first + some < num_blocks)[:, None] & there
        tops = tl.load(largest + at, mask=mask, other=-float("inf"))
        parts = tl.load(sums + at, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - finite) + tl.sum(parts * tl.exp2(tops - finite[None, :]), 0)
        top = higher
    empty = top == -float("inf")
    shifted = tl.load(shift + anchors, mask=anchors < num_anchors, other=0.0)
    finite = tl.where(empty, 0.0, top)
    log_mean = tl.where(empty, -float("inf"), (finite + tl.log2(tl.where(empty, 1.0, total))) * LN2 + shifted)
    larger = tl.maximum(log_mean, log_eps)
    still = tl.where(larger == -float("inf"), 0.0, larger)
    # With eps = 0 an anchor without a logit has log 0.
    both = tl.exp2((log_mean - still) * LOG2E) + tl.exp2((log_eps - still) * LOG2E)
    a = tl.where(larger == -float("inf"), larger, still + tl.log2(tl.where(larger == -float("inf"), 1.0, both)) * LN2)
    if PREDICT:
        tl.store(predicted + anchors, a, mask=anchors < num_anchors)
    else:
        wanted = tl.load(target + anchors, mask=anchors < num_anchors, other=0.0)
        still = tl.where(empty, 0.0, a)
        pull = (1.0 - tl.exp2((wanted - still) * LOG2E)) * share * tl.load(scale)
        pull = tl.where(empty, 0.0, pull)
        below = (shifted - still) * LOG2E
        for first in range(0, num_blocks, BLOCKS):
            at = (first + some)[:, None] * num_anchors + anchors[None, :]
            mask = (first + some < num_blocks)[:, None] & there
            tops = tl.load(largest + at, mask=mask, other=-float("inf"))
            tl.store(largest + at, pull[None, :] * tl.exp2(tops + below[None, :]), mask=mask)


@triton.jit
def pull_kernel(
    out, weights, factors, anchors,
    num_prototypes, num_anchors, d, split_anchors, split_stride, weights_stride, anchor_stride, inner_stride,
    ADD: tl.constexpr, FACTOR_BLOCK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, k, :] (+)= sum_i weights[k, i] factors[block of k, i] anchors[i, :], fp32.

    Program axis 1 counts the splits of the sum; with ADD there is one, which adds to what `out` [m, d] holds. BLOCK_M
    divides FACTOR_BLOCK, the prototypes of a block of factors. EVEN: every split is whole blocks.
    """
    block_m, block_n = _place(num_prototypes, d, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * split_anchors
    stop = min(first + split_anchors, num_anchors)
    inner = first + tl.arange(0, BLOCK_K)
    weights_at = weights + (rows % num_prototypes)[:, None] * weights_stride + inner[None, :]
    factors_at = factors + (block_m * BLOCK_M // FACTOR_BLOCK) * num_anchors + inner
    anchors_at = anchors + inner[:, None] * anchor_stride + (columns % d)[None, :] * inner_stride
    there = (rows < num_prototypes)[:, None] & (columns < d)[None, :]
    at = out + split * split_stride + rows[:, None] * d + columns[None, :]
    if ADD:  # noqa: SIM108
        total = tl.load(at, mask=there, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _multiplied(
        total, weights_at, 1, factors_at, anchors_at, anchor_stride, first, stop,
        True, EVEN, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip
    tl.store(at, total, mask=there)


@triton.jit
def adagrad_kernel(
    weight, squares, gradient, directions, learning_rate, eps, num_prototypes, d,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`gradient` for the prototypes' directions, turned into one step of AdaGrad and the new directions.

    It is projected on the tangent space and divided by the prototype's norm. All are [m, d], rows contiguous.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None] * d + inner[None, :]
    there = (rows < num_prototypes)[:, None] & (inner < d)[None, :]
    w = tl.load(weight + at, mask=there, other=0.0)
    g = tl.load(gradient + at, mask=there, other=0.0)
    square = tl.load(squares + at, mask=there, other=0.0)
    past = rows >= num_prototypes
    norm = tl.where(past, 1.0, tl.sqrt_rn(tl.sum(w * w, 1)))[:, None]
    unit = w / norm
    g = (g - unit * tl.sum(unit * g, 1)[:, None]) / norm
    square += g * g
    w -= learning_rate * g / (tl.sqrt_rn(square) + eps)
    tl.store(weight + at, w, mask=there)
    tl.store(squares + at, square, mask=there)
    unit = w / tl.where(past, 1.0, tl.sqrt_rn(tl.sum(w * w, 1)))[:, None]
    tl.store(directions + at, unit.to(directions.dtype.element_ty), mask=there)
