"""Estimates of each pair's log-normalizer: from the batch, from a table over the data set, or predicted by the NPN."""

from neuclip_scale.normalizers.batch import batch_log_normalizers
from neuclip_scale.normalizers.npn import NormalizerPredictionNetwork
from neuclip_scale.normalizers.recent import RecentPairs
from neuclip_scale.normalizers.table import NormalizerTable

__all__ = ["NormalizerPredictionNetwork", "NormalizerTable", "RecentPairs", "batch_log_normalizers"]
