"""Similarities of image-text pairs: row statistics and feature gradients, without the [b, B] matrix."""

from neuclip_scale.similarity.pairs import PairFeatures
from neuclip_scale.similarity.sigmoid import pair_sigmoids
from neuclip_scale.similarity.tiled import pair_gradients, pair_logsumexp, pair_row_sums

__all__ = ["PairFeatures", "pair_gradients", "pair_logsumexp", "pair_row_sums", "pair_sigmoids"]
