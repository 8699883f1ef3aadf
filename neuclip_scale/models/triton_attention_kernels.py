"""Triton kernels of attention over short sequences. Imported only where they run: see `fused`.

A general kernel's tiles are as long as a GPU likes them, and a picture of 197 tokens fills the last of them badly; its
gradients need sums that programs share, and passes over memory that put them where the joint projection of queries,
keys and values reads. Here a program has BLOCK tokens of one head of one sequence and meets the others STEP at a time;
what is left over, 5 tokens of 197 and one of 257, takes tiles of TAIL. The scores are computed twice for the gradients,
once for those of queries and once for those of keys and values: seven products, not five, but sums stay in registers,
so that three or four programs share a multiprocessor and one multiplies while another takes exponentials. Every
gradient is written once, where it is read. No atomics, the same bits every time.

Each kernel reckons its own pointers: torch looks up in the code which tensors a kernel writes, and where a function
returns several pointers it takes all for written, and would copy them.

Shapes: qkv and dqkv [N, L, 3 heads HEAD], out and dout [N, L, heads HEAD], levels and means [N, heads, L], and sums
[N, blocks, 3 heads HEAD].
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from neuclip_scale.similarity.triton_kernels import LOG2E


@triton.jit
def _place(num_tokens, heads, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """Of this program: its head among all, its sequence's first token, its head's first number, its first token."""
    blocks = tl.cdiv(num_tokens, BLOCK)
    one = tl.program_id(0) // blocks
    return (
        one.to(tl.int64),
        (one // heads).to(tl.int64) * num_tokens,
        one % heads * HEAD,
        tl.program_id(0) % blocks * BLOCK,
    )


@triton.jit
def _load(
    at, first, width, num_tokens, ROWS: tl.constexpr, HEAD: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr
):
    """[ROWS, HEAD] from token `first` on, `width` numbers from one token to the next; zero behind the last."""
    rows = first + tl.arange(0, ROWS)
    places = at + rows[:, None] * width + tl.arange(0, HEAD)[None, :]
    values = tl.load(places) if WHOLE else tl.load(places, mask=(rows < num_tokens)[:, None], other=0.0)
    return values.to(tl.float32) if UPCAST else values  # the interpreter has no bf16 product


@triton.jit
def _load_keys(
    at, first, width, num_tokens, ROWS: tl.constexpr, HEAD: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr
):
    """Keys and values of those tokens."""
    k = _load(at + width, first, 3 * width, num_tokens, ROWS, HEAD, WHOLE, UPCAST)
    v = _load(at + 2 * width, first, 3 * width, num_tokens, ROWS, HEAD, WHOLE, UPCAST)
    return k, v


@triton.jit
def _keys_end(first, num_tokens, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """Behind the last key that ROWS queries see."""
    return tl.minimum(first + ROWS, num_tokens) if CAUSAL else num_tokens


@triton.jit
def _store(at, values, first, width, num_tokens, ROWS: tl.constexpr, HEAD: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    places = at + rows[:, None] * width + tl.arange(0, HEAD)[None, :]
    tl.store(places, values.to(at.dtype.element_ty), mask=(rows < num_tokens)[:, None])


@triton.jit
def attention_kernel(
    out, levels, qkv, num_tokens, heads,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T / sqrt(HEAD)) v, and each query's log-sum-exp in powers of two, a block of queries."""
    one, start, head, first = _place(num_tokens, heads, BLOCK, HEAD)
    width = heads * HEAD
    at = qkv + start * (3 * width) + head
    to, levels_at = out + start * width + head, levels + one * num_tokens
    if num_tokens - first <= TAIL:
        _values(to, levels_at, at, first, num_tokens, width, TAIL, HEAD, STEP, TAIL, CAUSAL, UPCAST)
    else:
        _values(to, levels_at, at, first, num_tokens, width, BLOCK, HEAD, STEP, TAIL, CAUSAL, UPCAST)


@triton.jit
def _values(
    to, levels, at, first, num_tokens, width,
    ROWS: tl.constexpr, HEAD: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of ROWS queries."""
    q = _load(at, first, 3 * width, num_tokens, ROWS, HEAD, False, UPCAST)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, HEAD), tl.float32)
    end = _keys_end(first, num_tokens, ROWS, CAUSAL)
    whole = end // STEP * STEP
    for key in range(0, whole, STEP):
        largest, total, sums = _meet(
            largest, total, sums, q, at, first, key, num_tokens, width, ROWS, HEAD, STEP, True, CAUSAL, UPCAST
        )
    for key in range(whole, end, TAIL):
        largest, total, sums = _meet(
            largest, total, sums, q, at, first, key, num_tokens, width, ROWS, HEAD, TAIL, False, CAUSAL, UPCAST
        )
    _store(to, sums / total[:, None], first, width, num_tokens, ROWS, HEAD)
    rows = first + tl.arange(0, ROWS)
    tl.store(levels + rows, largest + tl.log2(total), mask=rows < num_tokens)


@triton.jit
def _meet(
    largest, total, sums, q, at, first, key, num_tokens, width,
    ROWS: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The queries' sums with KEYS keys more."""
    scale: tl.constexpr = HEAD**-0.5 * LOG2E
    k, v = _load_keys(at, key, width, num_tokens, KEYS, HEAD, WHOLE, UPCAST)
    logits = tl.dot(q, k.T) * scale
    keys = key + tl.arange(0, KEYS)
    if not WHOLE:
        logits = tl.where((keys < num_tokens)[None, :], logits, -float("inf"))
    if CAUSAL:
        logits = tl.where(keys[None, :] <= (first + tl.arange(0, ROWS))[:, None], logits, -float("inf"))
    larger = tl.maximum(largest, tl.max(logits, 1))
    terms = tl.exp2(logits - larger[:, None])
    shrink = tl.exp2(largest - larger)
    return larger, total * shrink + tl.sum(terms, 1), tl.dot(terms.to(v.dtype), v, sums * shrink[:, None])


@triton.jit
def attention_queries_kernel(
    dqkv, sums, means, dout, out, levels, qkv, num_tokens, heads,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of queries, their sums before they are rounded, and means, what each query's slopes of
    its probabilities are by these probabilities, which the keys' gradients need."""
    one, start, head, first = _place(num_tokens, heads, BLOCK, HEAD)
    width = heads * HEAD
    at, to = qkv + start * (3 * width) + head, dqkv + start * (3 * width) + head
    dout_at, out_at = dout + start * width + head, out + start * width + head
    levels_at, means_at = levels + one * num_tokens, means + one * num_tokens
    sums_at = sums + (one // heads * tl.cdiv(num_tokens, BLOCK) + first // BLOCK) * (3 * width) + head
    if num_tokens - first <= TAIL:
        _dq(
            to, sums_at, means_at, dout_at, out_at, levels_at, at, first, num_tokens, width,
            TAIL, HEAD, STEP, TAIL, CAUSAL, UPCAST,
        )  # fmt: skip
    else:
        _dq(
            to, sums_at, means_at, dout_at, out_at, levels_at, at, first, num_tokens, width,
            BLOCK, HEAD, STEP, TAIL, CAUSAL, UPCAST,
        )  # fmt: skip


@triton.jit
def _dq(
    to, sums, means, dout, out, levels, at, first, num_tokens, width,
    ROWS: tl.constexpr, HEAD: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of ROWS queries."""
    scale: tl.constexpr = HEAD**-0.5
    rows = first + tl.arange(0, ROWS)
    there = rows < num_tokens
    q = _load(at, first, 3 * width, num_tokens, ROWS, HEAD, False, UPCAST)
    slopes = _load(dout, first, width, num_tokens, ROWS, HEAD, False, UPCAST)
    values = _load(out, first, width, num_tokens, ROWS, HEAD, False, UPCAST)
    mean = tl.sum(slopes.to(tl.float32) * values.to(tl.float32), 1)
    tl.store(means + rows, mean, mask=there)
    level = tl.load(levels + rows, mask=there, other=float("inf"))
    dq = tl.zeros((ROWS, HEAD), tl.float32)
    end = _keys_end(first, num_tokens, ROWS, CAUSAL)
    whole = end // STEP * STEP
    for key in range(0, whole, STEP):
        dq = _dq_of(
            dq, q, slopes, mean, level, at, first, key, num_tokens, width, ROWS, HEAD, STEP, True, CAUSAL, UPCAST
        )
    for key in range(whole, end, TAIL):
        dq = _dq_of(
            dq, q, slopes, mean, level, at, first, key, num_tokens, width, ROWS, HEAD, TAIL, False, CAUSAL, UPCAST
        )
    dq *= scale
    _store(to, dq, first, 3 * width, num_tokens, ROWS, HEAD)
    tl.store(sums + tl.arange(0, HEAD), tl.sum(dq, 0))


@triton.jit
def _dq_of(
    dq, q, slopes, mean, level, at, first, key, num_tokens, width,
    ROWS: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq with what KEYS keys add."""
    scale: tl.constexpr = HEAD**-0.5 * LOG2E
    k, v = _load_keys(at, key, width, num_tokens, KEYS, HEAD, WHOLE, UPCAST)
    p = tl.exp2(tl.dot(q, k.T) * scale - level[:, None])
    if not WHOLE:  # a key of zeros can have an infinite p, which times zero is no number
        p = tl.where((key + tl.arange(0, KEYS) < num_tokens)[None, :], p, 0.0)
    if CAUSAL:
        p = tl.where((key + tl.arange(0, KEYS))[None, :] <= (first + tl.arange(0, ROWS))[:, None], p, 0.0)
    ds = p * (tl.dot(slopes, v.T) - mean[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def attention_keys_kernel(
    dqkv, sums, means, dout, levels, qkv, num_tokens, heads,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and of their values, and their sums before they are rounded."""
    one, start, head, first = _place(num_tokens, heads, BLOCK, HEAD)
    width = heads * HEAD
    at, to = qkv + start * (3 * width) + head, dqkv + start * (3 * width) + head
    dout_at = dout + start * width + head
    levels_at, means_at = levels + one * num_tokens, means + one * num_tokens
    sums_at = sums + (one // heads * tl.cdiv(num_tokens, BLOCK) + first // BLOCK) * (3 * width) + head
    if num_tokens - first <= TAIL:
        _dk_dv(
            to, sums_at, means_at, dout_at, levels_at, at, first, num_tokens, width,
            TAIL, HEAD, STEP, TAIL, CAUSAL, UPCAST,
        )  # fmt: skip
    else:
        _dk_dv(
            to, sums_at, means_at, dout_at, levels_at, at, first, num_tokens, width,
            BLOCK, HEAD, STEP, TAIL, CAUSAL, UPCAST,
        )  # fmt: skip


@triton.jit
def _dk_dv(
    to, sums, means, dout, levels, at, first, num_tokens, width,
    ROWS: tl.constexpr, HEAD: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of ROWS keys."""
    scale: tl.constexpr = HEAD**-0.5
    k, v = _load_keys(at, first, width, num_tokens, ROWS, HEAD, False, UPCAST)
    dk, dv = tl.zeros((ROWS, HEAD), tl.float32), tl.zeros((ROWS, HEAD), tl.float32)
    begin = 0
    if CAUSAL:
        begin = first
    whole = num_tokens // STEP * STEP
    for query in range(begin, whole, STEP):
        dk, dv = _dk_dv_of(
            dk, dv, k, v, means, dout, levels, at, first, query, num_tokens, width,
            ROWS, HEAD, STEP, True, CAUSAL, UPCAST,
        )  # fmt: skip
    for query in range(tl.maximum(whole, begin), num_tokens, TAIL):
        dk, dv = _dk_dv_of(
            dk, dv, k, v, means, dout, levels, at, first, query, num_tokens, width,
            ROWS, HEAD, TAIL, False, CAUSAL, UPCAST,
        )  # fmt: skip
    there = (first + tl.arange(0, ROWS) < num_tokens)[:, None]
    dk, dv = tl.where(there, dk * scale, 0.0), tl.where(there, dv, 0.0)
    _store(to + width, dk, first, 3 * width, num_tokens, ROWS, HEAD)
    _store(to + 2 * width, dv, first, 3 * width, num_tokens, ROWS, HEAD)
    tl.store(sums + width + tl.arange(0, HEAD), tl.sum(dk, 0))
    tl.store(sums + 2 * width + tl.arange(0, HEAD), tl.sum(dv, 0))


@triton.jit
def _dk_dv_of(
    dk, dv, k, v, means, dout, levels, at, first, query, num_tokens, width,
    ROWS: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv with what QUERIES queries add, keys down and queries across. Behind the last token they add nothing."""
    scale: tl.constexpr = HEAD**-0.5 * LOG2E
    queries = query + tl.arange(0, QUERIES)
    there = queries < num_tokens
    q = _load(at, query, 3 * width, num_tokens, QUERIES, HEAD, WHOLE, UPCAST)
    slopes = _load(dout, query, width, num_tokens, QUERIES, HEAD, WHOLE, UPCAST)
    level = tl.load(levels + queries, mask=there, other=float("inf"))
    mean = tl.load(means + queries, mask=there, other=0.0)
    p = tl.exp2(tl.dot(k, q.T) * scale - level[None, :])
    if CAUSAL:
        p = tl.where((first + tl.arange(0, ROWS))[:, None] <= queries[None, :], p, 0.0)
    dv = tl.dot(p.to(slopes.dtype), slopes, dv)
    ds = p * (tl.dot(v, slopes.T) - mean[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv
