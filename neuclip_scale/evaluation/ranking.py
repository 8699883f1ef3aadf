"""Ranks of the right answer among all answers, with ties counted against the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIE = 1e-6
"""Cosines closer than this are a tie: float32 rounding differs with the position in a matrix product."""

_BLOCK_ELEMENTS = 1 << 24


def pessimistic_ranks(queries: Tensor, gallery: Tensor, right: Tensor) -> Tensor:
    """For each query the number of wrong gallery rows that score at least as high as its best right one,
    int64 [Q].

    Shapes: `queries` [Q, d] and `gallery` [G, d], unit rows; `right` [Q, R] holds gallery positions, padded
    with -1. 0 is the first place; a tie, or a score that is not a number, counts as lost. Works in blocks of
    queries: no [Q, G] matrix.
    """
    ranks = []
    step = max(1, _BLOCK_ELEMENTS // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step].float() @ gallery.float().T  # [q, G]
        mine = right[start : start + step]
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        rows, columns = (mine >= 0).nonzero(as_tuple=True)
        is_right[rows, mine[rows, columns]] = True
        best = scores.masked_fill(~is_right, -math.inf).amax(dim=1, keepdim=True)
        # "not less" and not "greater or equal": a comparison with nan is False, and nan must not win.
        ranks.append((~(scores < best - TIE) & ~is_right).sum(dim=1))
    return torch.cat(ranks)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of `ranks` within the first `k`."""
    return float((ranks < k).double().mean())


def chance_at(num_right: Tensor, num_gallery: int, k: int) -> float:
    """Expected share of queries with a right answer among `k` drawn at random, `num_right` [Q] of
    `num_gallery` right.

    1 - C(G - R, k) / C(G, k), which is k/G for one right answer.
    """
    counts, frequency = num_right.unique(return_counts=True)
    k = min(k, num_gallery)
    total = 0.0
    for right, queries in zip(counts.tolist(), frequency.tolist(), strict=True):
        miss = math.comb(num_gallery - right, k) / math.comb(num_gallery, k)
        total += queries * (1 - miss)
    return total / len(num_right)
