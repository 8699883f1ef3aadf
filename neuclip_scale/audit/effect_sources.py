"""Published results from which the effect of a data difference is bounded; all in points, 100 for everything right."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Metric = Literal["average", "imagenet"]
"""DataComp's average over 38 tasks, or ImageNet's zero-shot top-1."""

SEED_DEVIATION: dict[Metric, float] = {"average": 0.6, "imagenet": 0.2}
"""DataComp's README sees differences between seeds of typically 0.2 points on ImageNet and up to 0.006 of the average.
Taken for the standard deviation of one run, which is generous to noise: the README speaks of differences."""

REPEAT_DECAY = 15.387756
"""R_D*, Muennighoff et al., "Scaling Data-Constrained Language Models" (arXiv 2305.16264), appendix A."""


class Baseline(NamedTuple):
    """A row of DataComp's table 3 (arXiv 2304.14108); model and samples seen are those of the scale."""

    scale: str
    filtering: str
    pairs: float
    pool: float
    imagenet: float
    average: float

    def score(self, metric: Metric) -> float:
        """In points."""
        return 100 * (self.imagenet if metric == "imagenet" else self.average)


_CLIP, _BOTH = "CLIP score (L/14 30%)", "Image-based and CLIP score (L/14 30%)"
DATACOMP_TABLE_3 = (
    Baseline("small", "No filtering", 12.8e6, 12.8e6, 0.025, 0.132),
    Baseline("small", _CLIP, 3.8e6, 12.8e6, 0.051, 0.173),
    Baseline("small", _BOTH, 1.4e6, 12.8e6, 0.039, 0.144),
    Baseline("medium", "No filtering", 128e6, 128e6, 0.176, 0.258),
    Baseline("medium", _CLIP, 38e6, 128e6, 0.273, 0.328),
    Baseline("medium", _BOTH, 14e6, 128e6, 0.297, 0.328),
    Baseline("large", "No filtering", 1.28e9, 1.28e9, 0.459, 0.437),
    Baseline("large", _CLIP, 384e6, 1.28e9, 0.578, 0.529),
    Baseline("large", _BOTH, 140e6, 1.28e9, 0.631, 0.537),
    Baseline("xlarge", "No filtering", 12.8e9, 12.8e9, 0.723, 0.621),
    Baseline("xlarge", _CLIP, 3.8e9, 12.8e9, 0.764, 0.650),
    Baseline("xlarge", _BOTH, 1.4e9, 12.8e9, 0.792, 0.663),
)
"""Unfiltered, and its two best filters."""


class Found(NamedTuple):
    """A figure with the words that say where it is from."""

    value: float
    source: str


def points_per_doubling(metric: Metric) -> Found:
    """The largest gain for twice the pairs between two scales with one filter.

    Model and compute grow ten-fold beside the data there, so data alone at fixed compute should give less.
    """
    found = []
    for small in DATACOMP_TABLE_3:
        for large in DATACOMP_TABLE_3:
            if small.filtering == large.filtering and large.pool == 10 * small.pool:
                slope = (large.score(metric) - small.score(metric)) / math.log2(large.pairs / small.pairs)
                steps = f"{small.scale} to {large.scale}, {small.filtering}"
                found.append(Found(slope, f"DataComp table 3, {steps}: model and compute grow too"))
    return max(found)


def points_per_share(metric: Metric) -> Found:
    """The largest gain of a filter over no filtering at equal compute, divided by the share of pairs it removes."""
    gains = [(row, gain / (1 - row.pairs / row.pool)) for row, gain in _filter_gains(metric)]
    row, rate = max(gains, key=lambda pair: pair[1])
    return Found(rate, f"DataComp table 3, {row.scale}: {row.filtering} removes {1 - row.pairs / row.pool:.0%}")


def largest_filter_gain(metric: Metric) -> Found:
    """The largest gain of a filter over no filtering at equal compute."""
    row, gain = max(_filter_gains(metric), key=lambda pair: pair[1])
    return Found(gain, f"DataComp table 3, {row.scale}: {row.filtering}")


def _filter_gains(metric: Metric) -> list[tuple[Baseline, float]]:
    whole = {row.scale: row.score(metric) for row in DATACOMP_TABLE_3 if row.pairs == row.pool}
    return [(row, row.score(metric) - whole[row.scale]) for row in DATACOMP_TABLE_3 if row.pairs < row.pool]
