"""Estimates of each pair's log-normalizer: from the batch, a table over the data set, networks, or a queue."""

from neuclip_scale.normalizers.amortized import AmortizedNormalizers
from neuclip_scale.normalizers.batch import batch_log_normalizers
from neuclip_scale.normalizers.npn import NormalizerPredictionNetwork
from neuclip_scale.normalizers.queue import EmbeddingQueue, join_with_batch
from neuclip_scale.normalizers.recent import RecentPairs
from neuclip_scale.normalizers.table import NormalizerTable, SampleTable
from neuclip_scale.normalizers.temperatures import IndividualTemperatures

__all__ = [
    "AmortizedNormalizers",
    "EmbeddingQueue",
    "IndividualTemperatures",
    "NormalizerPredictionNetwork",
    "NormalizerTable",
    "RecentPairs",
    "SampleTable",
    "batch_log_normalizers",
    "join_with_batch",
]
