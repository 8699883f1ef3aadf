"""Whether a gain claimed between two runs can come from seeds, or from the data in which their downloads differ.

Bounds, not estimates: every one rests on an assumption that is written beside it, and is taken where it explains most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from neuclip_scale.audit.effect_sources import (
    REPEAT_DECAY,
    SEED_DEVIATION,
    Found,
    Metric,
    largest_filter_gain,
    points_per_doubling,
    points_per_share,
)
from neuclip_scale.audit.statistics import normal_quantile
from neuclip_scale.evaluation.statistics import student_t_quantile

Verdict = Literal[
    "no larger than seed noise", "could be explained by the data difference", "not explained under the assumptions"
]

_SEED_SOURCE = "DataComp's README: the size of differences between its seeds, generously taken for one run's deviation"


@dataclass(frozen=True, kw_only=True)
class Downloads:
    """How many distinct pairs two runs could train on, and how many are in both. Raises ValueError where that cannot
    be."""

    first: int
    second: int
    common: int

    def __post_init__(self) -> None:
        if not 0 <= self.common <= min(self.first, self.second) or min(self.first, self.second) < 1:
            raise ValueError(
                f"first = {self.first}, second = {self.second}, common = {self.common}: give 0 <= common <= both, "
                "and at least one pair each"
            )

    @property
    def jaccard(self) -> float:
        """Pairs in both over pairs in either."""
        return self.common / (self.first + self.second - self.common)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the bounds rest on; None takes the published figure of the metric. All in points."""

    seed_deviation: float | None = None
    """Standard deviation of one run over seeds, where no scores of several seeds are given."""
    points_per_doubling: float | None = None
    """Gain from twice the distinct pairs at fixed compute."""
    points_per_share: float | None = None
    """Gain from replacing a share of the pairs by others, over that share: 0 says that pairs are missing at random."""
    repeat_decay: float = REPEAT_DECAY
    """R_D*: repetitions after which a pair's further ones are worth 1/e of new pairs."""
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("seed_deviation", "points_per_doubling", "points_per_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value}: give a number of points from 0 up")
        if not 0 < self.repeat_decay < math.inf or not 0 < self.confidence < 1:
            told = f"repeat_decay = {self.repeat_decay}, confidence = {self.confidence}"
            raise ValueError(f"{told}: give one above 0, and one in (0, 1)")


@dataclass(frozen=True)
class Effect:
    """A claimed gain beside what else could make it, in points."""

    gain: float
    metric: str
    downloads: Downloads
    samples_seen: int | None
    noise_limit: float
    """Largest difference that seeds alone make at the confidence asked."""
    quantity_by_repeats: float | None
    """From more distinct pairs on the better side, repeats losing value; None without the samples seen."""
    quantity: float
    """The same, if only distinct pairs counted: the upper bound."""
    selection: float
    """From the pairs that only one side has, if they were as good, or as bad, as what a filter keeps or removes."""
    selection_ceiling: float
    """The same if those pairs held the whole effect of the best published filter."""
    verdict: Verdict
    sentence: str
    assumptions: tuple[str, ...]

    @property
    def explainable(self) -> float:
        """Largest gain that seeds and data explain together."""
        return self.noise_limit + self.quantity + self.selection

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "explainable": self.explainable, "jaccard": self.downloads.jaccard}


def judge_gain(
    gain: float,
    downloads: Downloads,
    *,
    metric: Metric = "average",
    samples_seen: int | None = None,
    first_scores: Sequence[float] = (),
    second_scores: Sequence[float] = (),
    assumptions: Assumptions | None = None,
) -> Effect:
    """Hold `gain`, the first run's score minus the second's in points, against seeds and against their data.

    `samples_seen` is that of each run, equal for both. Scores of several seeds, in points, replace the published noise.
    Raises ValueError for numbers that are not finite, for samples below 1, and for scores whose means do not differ
    by `gain`.
    """
    assumptions = assumptions or Assumptions()
    if not math.isfinite(gain) or (samples_seen is not None and samples_seen < 1):
        raise ValueError(f"gain = {gain}, samples_seen = {samples_seen}: give points, and samples from 1 up")
    noise, noise_words = _noise(gain, metric, first_scores, second_scores, assumptions)
    sides = downloads.first, downloads.second
    # Of no gain the side with more pairs is the one whose gain its data could explain.
    better, worse = sides if (gain, downloads.first) >= (0.0, downloads.second) else sides[::-1]
    slope = _given(assumptions.points_per_doubling, points_per_doubling, metric)
    # A run that ends before its first pass does has seen as many distinct pairs as any other.
    seen = [count if samples_seen is None else min(count, samples_seen) for count in (better, worse)]
    quantity = max(0.0, slope.value * math.log2(seen[0] / seen[1]))
    by_repeats = None
    if samples_seen is not None:
        pairs = (effective_pairs(count, samples_seen, assumptions.repeat_decay) for count in (better, worse))
        by_repeats = max(0.0, slope.value * math.log2(next(pairs) / next(pairs)))
    rate = _given(assumptions.points_per_share, points_per_share, metric)
    whole = _given(assumptions.points_per_share, largest_filter_gain, metric)
    only = [1 - downloads.common / count for count in (better, worse)]
    selection = sum(min(whole.value, rate.value * share) for share in only)
    ceiling = whole.value * sum(share > 0 for share in only)
    verdict = _verdict(abs(gain), noise, quantity + selection)
    said = (
        noise_words,
        f"log-linear: twice the distinct pairs at fixed compute give at most {slope.value:.2f} points ({slope.source})",
        _repeat_words(samples_seen, assumptions.repeat_decay),
        f"a share of the pairs that one side lacks moves the score by at most {rate.value:.1f} points times the share, "
        f"on each side ({rate.source}); the very worst pairs could do more",
    )
    numbers = (noise, by_repeats, quantity, selection, ceiling)
    sentence = _sentence(gain, metric, downloads, numbers, assumptions.confidence, verdict)
    return Effect(gain, metric, downloads, samples_seen, *numbers, verdict, sentence, said)


def effective_pairs(unique: int, samples_seen: int, decay: float = REPEAT_DECAY) -> float:
    """New pairs that `samples_seen` of `unique` pairs are worth: U + U R* (1 - exp(-R / R*)), R = seen / U - 1.

    Muennighoff et al. (arXiv 2305.16264, section 3), found on language models. Raises ValueError unless positive.
    """
    if unique < 1 or samples_seen < 1 or not decay > 0:
        raise ValueError(f"unique = {unique}, samples_seen = {samples_seen}, decay = {decay}: give positive ones")
    if samples_seen <= unique:
        return float(samples_seen)
    return unique * (1 - decay * math.expm1(-(samples_seen / unique - 1) / decay))


def noise_limit(deviations: tuple[float, float], counts: tuple[int, int], degrees: float, confidence: float) -> float:
    """Half width of the interval of the difference of two means of `counts` seeds; infinite degrees: normal."""
    error = math.sqrt(sum(deviation**2 / count for deviation, count in zip(deviations, counts, strict=True)))
    middle = 0.5 + confidence / 2
    quantile = normal_quantile(middle) if math.isinf(degrees) else student_t_quantile(middle, degrees)
    return quantile * error


def _noise(
    gain: float, metric: Metric, first: Sequence[float], second: Sequence[float], assumptions: Assumptions
) -> tuple[float, str]:
    """Limit of seed noise and the words for it."""
    counts = max(1, len(first)), max(1, len(second))
    if first and second and not math.isclose(_mean(first) - _mean(second), gain, abs_tol=0.01, rel_tol=1e-6):
        raise ValueError(
            f"gain = {gain}: the mean scores differ by {_mean(first) - _mean(second)}; give that, in points"
        )
    several = [scores for scores in (first, second) if len(scores) > 1]
    if not several or assumptions.seed_deviation is not None:
        known = _given(assumptions.seed_deviation, lambda name: Found(SEED_DEVIATION[name], _SEED_SOURCE), metric)
        limit = noise_limit((known.value, known.value), counts, math.inf, assumptions.confidence)
        runs = f"{counts[0]} against {counts[1]} run(s)"
        return (
            limit,
            f"one run varies over seeds with a standard deviation of {known.value:g} points ({known.source}); {runs}",
        )
    deviations = [_deviation(scores if len(scores) > 1 else several[0]) for scores in (first, second)]
    if len(several) == 1:
        degrees = float(len(several[0]) - 1)
        how = f"{len(several[0])} seeds of one side, taken for both sides' noise"
    else:
        degrees = _welch_degrees(deviations, counts)
        how = f"{counts[0]} and {counts[1]} seeds (Welch's t, {degrees:.1f} degrees of freedom)"
    limit = noise_limit((deviations[0], deviations[1]), counts, degrees, assumptions.confidence)
    return limit, f"seed noise as measured over {how}"


def _welch_degrees(deviations: Sequence[float], counts: tuple[int, int]) -> float:
    parts = [deviation**2 / count for deviation, count in zip(deviations, counts, strict=True)]
    if not sum(parts):
        return float(sum(counts) - 2)
    return sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))


def _given(value: float | None, published: Any, metric: Metric) -> Found:
    if value is not None:
        return Found(value, "as given")
    found: Found = published(metric)
    return found


def _verdict(gain: float, noise: float, data: float) -> Verdict:
    if gain <= noise:
        return "no larger than seed noise"
    if gain <= noise + data:
        return "could be explained by the data difference"
    return "not explained under the assumptions"


def _repeat_words(samples_seen: int | None, decay: float) -> str:
    if samples_seen is None:
        return "the samples seen are not known, so repeats are taken for worthless: only distinct pairs count"
    return (
        f"{samples_seen:,} samples seen by each run; the lower figure for quantity has repeats lose value with R* = "
        f"{decay:.1f}, which was found on language models (arXiv 2305.16264), the upper one has them worthless"
    )


def _sentence(
    gain: float,
    metric: str,
    downloads: Downloads,
    numbers: tuple[float, float | None, float, float, float],
    confidence: float,
    verdict: Verdict,
) -> str:
    noise, by_repeats, quantity, selection, ceiling = numbers
    what = "the 38-task average" if metric == "average" else "ImageNet"
    between = f"{by_repeats:.2f} to {quantity:.2f}" if by_repeats is not None else f"up to {quantity:.2f}"
    end = verdict if verdict.startswith("could") else f"is {verdict}"
    if verdict == "not explained under the assumptions" and abs(gain) <= noise + quantity + ceiling:
        end += f"; only pairs that held the whole effect of the best published filter ({ceiling:.1f} points) could"
    return (
        f"Of the difference of {gain:+.2f} points on {what}, seeds alone make up to {noise:.2f} "
        f"({confidence:.0%} confidence); the downloads hold {downloads.first:,} and {downloads.second:,} pairs, "
        f"{downloads.common:,} of them in common (Jaccard {downloads.jaccard:.1%}), which could make {between} more by "
        f"their number and up to {selection:.2f} by which pairs they are: the difference {end}."
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
