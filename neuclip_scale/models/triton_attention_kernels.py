"""Triton kernels of attention over sequences that fit a multiprocessor. Imported only where they run: see `fused`.

A program has one head of one sequence, all of its keys in shared memory. So the backward pass needs no second sweep for
the queries' gradient, no sums that programs share, and can write where the joint projection of queries, keys and values
reads: none of the passes over memory that put a general kernel's gradients there. No atomics, the same bits every time.

Shapes: qkv and dqkv [N, L, 3 heads D], out and dout [N, L, heads D], levels [N, heads, L], D = HEAD and L <= KEYS.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from neuclip_scale.similarity.triton_kernels import LOG2E


@triton.jit
def attention_kernel(
    out, levels, qkv, num_tokens, heads,
    KEYS: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T / sqrt(D)) v, and each query's log-sum-exp in powers of two."""
    scale: tl.constexpr = HEAD**-0.5
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    width = heads * HEAD
    first = sequence.to(tl.int64) * num_tokens
    base = qkv + first * (3 * width) + head * HEAD
    keys, within = tl.arange(0, KEYS), tl.arange(0, HEAD)
    at = keys[:, None] * (3 * width) + within[None, :]
    k = tl.load(base + width + at, mask=(keys < num_tokens)[:, None], other=0.0)
    v = tl.load(base + 2 * width + at, mask=(keys < num_tokens)[:, None], other=0.0)
    if UPCAST:  # the interpreter has no bf16 product
        k, v = k.to(tl.float32), v.to(tl.float32)
    for start in range(0, num_tokens, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        there = rows < num_tokens
        q = tl.load(base + rows[:, None] * (3 * width) + within[None, :], mask=there[:, None], other=0.0)
        logits = tl.dot(q.to(k.dtype), k.T) * (scale * LOG2E)
        logits = tl.where((keys < num_tokens)[None, :], logits, -float("inf"))
        largest = tl.max(logits, 1)
        terms = tl.exp2(logits - largest[:, None])
        total = tl.sum(terms, 1)
        values = tl.dot(terms.to(v.dtype), v) / total[:, None]
        out_at = out + (first + rows)[:, None] * width + head * HEAD + within[None, :]
        tl.store(out_at, values.to(out.dtype.element_ty), mask=there[:, None])
        tl.store(levels + tl.program_id(0).to(tl.int64) * num_tokens + rows, largest + tl.log2(total), mask=there)


@triton.jit
def attention_backward_kernel(
    dqkv, sums, dout, out, levels, qkv, num_tokens, heads,
    KEYS: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dqkv, and sums [N, 3 heads D], dqkv's over each sequence, before it is rounded.

    The gradients of keys and values stay in registers while the queries pass, a few at a time and transposed: so few
    queries are the narrow side of a tensor core's product, which has none for less than 64 rows.
    """
    scale: tl.constexpr = HEAD**-0.5
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    width = heads * HEAD
    first = sequence.to(tl.int64) * num_tokens
    base, gradients = qkv + first * (3 * width) + head * HEAD, dqkv + first * (3 * width) + head * HEAD
    keys, within = tl.arange(0, KEYS), tl.arange(0, HEAD)
    is_key = (keys < num_tokens)[:, None]
    at = keys[:, None] * (3 * width) + within[None, :]
    k = tl.load(base + width + at, mask=is_key, other=0.0)
    v = tl.load(base + 2 * width + at, mask=is_key, other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    dk = tl.zeros((KEYS, HEAD), tl.float32)
    dv = tl.zeros((KEYS, HEAD), tl.float32)
    dq_sum = tl.zeros((HEAD, QUERIES), tl.float32)
    for start in range(0, num_tokens, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        there = (rows < num_tokens)[:, None]
        q = tl.load(base + rows[:, None] * (3 * width) + within[None, :], mask=there, other=0.0).to(k.dtype)
        out_at = (first + rows)[:, None] * width + head * HEAD + within[None, :]
        slopes = tl.load(dout + out_at, mask=there, other=0.0).to(k.dtype)
        values = tl.load(out + out_at, mask=there, other=0.0)
        mean = tl.sum(slopes.to(tl.float32) * values.to(tl.float32), 1)  # of a query's dp, weighted by p
        levels_at = levels + tl.program_id(0).to(tl.int64) * num_tokens + rows
        level = tl.load(levels_at, mask=rows < num_tokens, other=float("inf"))
        p = tl.exp2(tl.dot(k, q.T) * (scale * LOG2E) - level[None, :])  # [KEYS, QUERIES]
        p = tl.where(is_key, p, 0.0)
        dp = tl.dot(v, slopes.T)
        dv = tl.dot(p.to(k.dtype), slopes, dv)
        ds = (p * (dp - mean[None, :])).to(k.dtype)
        dk = tl.dot(ds, q, dk)
        dq = tl.dot(k.T, ds) * scale  # [HEAD, QUERIES]
        dq_sum += dq
        dq_at = gradients + rows[None, :] * (3 * width) + within[:, None]
        tl.store(dq_at, dq.to(dqkv.dtype.element_ty), mask=(rows < num_tokens)[None, :])
    dk *= scale
    tl.store(gradients + width + at, dk.to(dqkv.dtype.element_ty), mask=is_key)
    tl.store(gradients + 2 * width + at, dv.to(dqkv.dtype.element_ty), mask=is_key)
    sums_at = sums + sequence.to(tl.int64) * (3 * width) + head * HEAD + within
    tl.store(sums_at, tl.sum(dq_sum, 1))
    tl.store(sums_at + width, tl.sum(dk, 0))
    tl.store(sums_at + 2 * width, tl.sum(dv, 0))
