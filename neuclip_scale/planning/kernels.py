"""What computes similarities, NPN and queue on a GPU, as far as a plan asks: Triton's kernels, or torch elsewhere.

Sizes are those of `similarity.choosing`, `normalizers.triton_npn` and `triton_queue`, which cannot be imported where
Triton is not.
"""

from __future__ import annotations

import math

from neuclip_scale.config import NPNConfig, Recipe, matmul_precision
from neuclip_scale.similarity.chunks import ChunkLimits, num_splits

FP32, BF16 = 4, 2
MIN_DIM, DIM_STEP = 64, 16
"""Widths that Triton takes: multiples from the least on."""
NPN_BYTES = 64 << 20
"""Most memory of an NPN's exponentials."""
BLOCK = 128
"""Rows and columns of the kernels' blocks."""
QUEUE_PROGRAMS, QUEUE_PLACES = 1024, 8
"""Programs that a queue's strips are made for, and horizons that there is room for at least."""


def by_triton(embed_dim: int, device: str = "cuda") -> bool:
    """Whether features of this width are left to Triton there."""
    return device == "cuda" and embed_dim >= MIN_DIM and embed_dim % DIM_STEP == 0


def has_tiles(config: Recipe, embed_dim: int) -> bool:
    """Whether `objective.tile_size` bounds any memory on a GPU; Triton's chunks have one size."""
    return not by_triton(embed_dim) or config.objective.name == "exact"


def item_size(config: Recipe) -> int:
    """Bytes of the factors, exponentials and weights of similarities and of the NPN."""
    return BF16 if matmul_precision(config.train) == "medium" else FP32


def similarity_bytes(config: Recipe, b: int, wide: int, d: int) -> tuple[int, int]:
    """Of the features rounded to bf16, where they are, and of a chunk of weights; b rows over `wide` columns."""
    limits, item = ChunkLimits(), item_size(config)
    rows = min(limits.height, b)
    others = 0 if b == config.train.global_batch_size else wide
    rounded = BF16 * 2 * (b + others) * d if item == BF16 else 0
    return rounded, item * rows * min(limits.weight_columns(rows, item), wide)


def npn_bytes(config: Recipe, npn: NPNConfig, b: int, d: int) -> int:
    """Of both NPNs' updates: for each its anchors and directions, the gradient and sums of each block; of exponentials
    and of a gradient in several parts there is one, which both use.
    """
    m, item = npn.num_prototypes, item_size(config)
    height = min(max(NPN_BYTES // (m * item) // BLOCK, 1) * BLOCK, b)
    side = item * (b + m) * d + FP32 * (m * d + 2 * math.ceil(m / BLOCK) * height)
    splits = num_splits(math.ceil(m / BLOCK) * math.ceil(d / BLOCK), height, 1024)
    parts = FP32 * splits * m * d if splits > 1 else 0
    return 2 * side + item * m * math.ceil(height / 64) * 64 + parts


def queue_copy_bytes(config: Recipe, owned: int, width: int) -> int:
    """Of the bf16 copy of a rank's `owned` entries, `width` of both sides, where products are in bf16."""
    return BF16 * owned * width if item_size(config) == BF16 else 0


def queue_sums_bytes(config: Recipe, owned: int, num_horizons: int, d: int) -> int:
    """Of one side's sums: the entries' weights and rests, a sum of each strip, anchor and column, rounded anchors; of
    both sides' results, in logs and joined.
    """
    B, item = config.train.global_batch_size, item_size(config)
    columns = 2 * max(QUEUE_PLACES, 1 << (num_horizons - 1).bit_length())
    wanted = math.ceil(QUEUE_PROGRAMS / math.ceil(B / BLOCK))
    depth = math.ceil(owned / (wanted * BLOCK)) * BLOCK
    strips = math.ceil(owned / depth)
    rounded = BF16 * B * d if item == BF16 else 0
    # Weights [K, H] and their running sums in fp64 beside the table that is made of them.
    return (
        owned * (BF16 * columns + 3 * FP32 * num_horizons)
        + FP32 * B * (strips * (columns + 1) + 6 * num_horizons)
        + rounded
    )
