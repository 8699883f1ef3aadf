"""Triton kernels of the queue's sums. Imported only where they run: see `choosing`.

`strip_kernel` takes a block of anchors through a strip of the queue, block by block of entries, and leaves one sum for
every horizon, relative to the anchor's largest logit in the strip; `join_kernel` joins the strips. The exponentials
meet the entries' weights on the tensor cores, straight from the registers: for that they are bf16, and so are the
weights, each as a number and what rounding took from it. Each output element has one program: no atomics, the same bits
every time.

Shapes: anchors [B, d], negatives [K, d], table [K, 2 P] (weights of at most P horizons, then their rests), sums
[strips, B, 2 P], largest [strips, B]. Logits in here are in powers of two.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from neuclip_scale.similarity.triton_kernels import LN2, LOG2E, _similarities


@triton.jit
def strip_kernel(
    anchors, negatives, table, sums, largest, scale, anchor_codes, entry_codes,
    num_anchors, num_entries, d, strip_entries,
    COLUMNS: tl.constexpr, RESTS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums[strip, i, :] = sum over the strip of 2^(logit - largest[strip, i]) table; own entries are left out.

    Programs of one strip follow each other, so that its entries stay in L2. BLOCK_N divides `strip_entries`. RESTS:
    what bf16 leaves of the exponentials counts too. An anchor without an entry in the strip has -inf and 0 there.
    """
    blocks_m = tl.cdiv(num_anchors, BLOCK_M)
    strip, block_m = tl.program_id(0) // blocks_m, tl.program_id(0) % blocks_m
    rows, within = block_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    horizons = tl.arange(0, COLUMNS)
    own = tl.load(anchor_codes + rows, mask=rows < num_anchors, other=-1)
    to_powers = tl.load(scale) * LOG2E
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    begin = strip * strip_entries
    block = negatives + begin.to(tl.int64) * d  # a long queue has more numbers than 32 bits count
    for start in range(begin, min(begin + strip_entries, num_entries), BLOCK_N):
        left = num_entries - start
        weights_at = table + (start + within)[:, None] * COLUMNS + horizons[None, :]
        weights = tl.load(weights_at, mask=(within < left)[:, None], other=0.0)
        tile = _similarities(
            anchors, block, rows, within, num_anchors, left, d, d, d,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION, UPCAST,
        )  # fmt: skip
        # Past the end the tile repeats entries, which neither weigh anything nor are larger than all others.
        codes = tl.load(entry_codes + start + within % left)
        tile = tl.where(own[:, None] == codes[None, :], -float("inf"), tile * to_powers)
        higher = tl.maximum(top, tl.max(tile, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        terms = tl.exp2(tile - finite[:, None])
        total *= tl.exp2(top - finite)[:, None]
        rounded = terms.to(tl.bfloat16)
        rests = (terms - rounded.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:  # the interpreter has no bf16 product
            rounded, rests, weights = rounded.to(tl.float32), rests.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(rounded, weights, total)
        if RESTS:
            total = tl.dot(rests, weights, total)
        top = higher
        block += BLOCK_N * d
    at = strip * num_anchors + rows
    tl.store(largest + at, top, mask=rows < num_anchors)
    sums_at = sums + at[:, None] * COLUMNS + horizons[None, :]
    tl.store(sums_at, total, mask=(rows < num_anchors)[:, None])


@triton.jit
def join_kernel(
    log_sums, sums, largest, positives, scale, num_anchors, num_strips, num_horizons,
    PLACES: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """log_sums [B, H] = log of the strips' sums, less scale * positives [B]; -inf for an anchor without an entry."""
    anchors = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there, horizons = anchors < num_anchors, tl.arange(0, PLACES)
    top = tl.full((ANCHORS,), -float("inf"), tl.float32)
    total = tl.zeros((ANCHORS, PLACES), tl.float32)
    for strip in range(num_strips):
        at = strip * num_anchors + anchors
        higher = tl.load(largest + at, mask=there, other=-float("inf"))
        sums_at = sums + at[:, None] * (2 * PLACES) + horizons[None, :]
        part = tl.load(sums_at, mask=there[:, None], other=0.0)
        part += tl.load(sums_at + PLACES, mask=there[:, None], other=0.0)
        both = tl.maximum(top, higher)
        finite = tl.where(both == -float("inf"), 0.0, both)
        total = total * tl.exp2(top - finite)[:, None] + part * tl.exp2(higher - finite)[:, None]
        top = both
    # Weights of very old entries for a short horizon are 0: an anchor may have entries, and yet nothing to sum.
    empty = total <= 0.0
    finite = tl.where(top == -float("inf"), 0.0, top)
    offset = tl.load(positives + anchors, mask=there, other=0.0) * tl.load(scale)
    logs = (finite[:, None] + tl.log2(tl.where(empty, 1.0, total))) * LN2 - offset[:, None]
    out = log_sums + anchors[:, None] * num_horizons + horizons[None, :]
    tl.store(out, tl.where(empty, -float("inf"), logs), mask=there[:, None] & (horizons < num_horizons)[None, :])
