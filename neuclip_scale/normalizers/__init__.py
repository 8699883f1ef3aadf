"""Estimates of each pair's log-normalizer: from the batch, a table, networks, a queue, or all pairs."""

from neuclip_scale.normalizers.amortized import AmortizedNormalizers
from neuclip_scale.normalizers.batch import batch_log_normalizers
from neuclip_scale.normalizers.exact import DatasetFeatures, exact_log_normalizers
from neuclip_scale.normalizers.horizon import HorizonMixture, horizons_up_to
from neuclip_scale.normalizers.npn import NormalizerPredictionNetwork
from neuclip_scale.normalizers.projecting_queue import ProjectingQueue
from neuclip_scale.normalizers.queue import EmbeddingQueue, QueueSums, join_with_batch
from neuclip_scale.normalizers.recent import RecentPairs
from neuclip_scale.normalizers.table import NormalizerTable, SampleTable
from neuclip_scale.normalizers.temperatures import IndividualTemperatures

__all__ = [
    "AmortizedNormalizers",
    "DatasetFeatures",
    "EmbeddingQueue",
    "HorizonMixture",
    "IndividualTemperatures",
    "NormalizerPredictionNetwork",
    "NormalizerTable",
    "ProjectingQueue",
    "QueueSums",
    "RecentPairs",
    "SampleTable",
    "batch_log_normalizers",
    "exact_log_normalizers",
    "horizons_up_to",
    "join_with_batch",
]
