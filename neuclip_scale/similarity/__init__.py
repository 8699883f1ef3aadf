"""Similarities of image-text pairs: row statistics and feature gradients, without the [b, B] matrix."""

from neuclip_scale.similarity.dispatch import pair_gradients, pair_logsumexp, pair_row_sums, pair_sigmoids
from neuclip_scale.similarity.pairs import BatchShape, PairFeatures, row_products
from neuclip_scale.similarity.ring import RingPairs
from neuclip_scale.similarity.sigmoid import pair_sigmoids_flops
from neuclip_scale.similarity.tiled import pair_gradients_flops, pair_logsumexp_flops, pair_row_sums_flops

__all__ = [
    "BatchShape",
    "PairFeatures",
    "RingPairs",
    "pair_gradients",
    "pair_gradients_flops",
    "pair_logsumexp",
    "pair_logsumexp_flops",
    "pair_row_sums",
    "pair_row_sums_flops",
    "pair_sigmoids",
    "pair_sigmoids_flops",
    "row_products",
]
