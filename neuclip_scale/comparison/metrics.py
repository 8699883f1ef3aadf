"""Scores of the arms with their intervals over seeds, and paired differences between arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from neuclip_scale.comparison.arms import Arm
from neuclip_scale.comparison.scores import Metric, run_scores, tell_sets_apart
from neuclip_scale.evaluation.measures import Measure
from neuclip_scale.evaluation.statistics import (
    EXACT_UP_TO,
    Estimate,
    holm,
    mean_interval,
    sign_flip_p,
    smallest_sign_flip_p,
)


@dataclass(frozen=True)
class MetricRow:
    """One metric over all arms; fractions."""

    metric: Metric
    chance: float
    majority: float | None
    arms: dict[str, Estimate]
    """Arm -> mean and 95 % interval over its seeds; arms without the metric are left out."""


@dataclass(frozen=True)
class PairedDifference:
    """`second` minus `first` in one metric, over the seeds both have."""

    first: str
    second: str
    metric: Metric
    seeds: list[str]
    differences: list[float]
    estimate: Estimate
    p: float
    p_holm: float
    """Corrected over the metrics of this pair of arms."""
    smallest_p: float
    """The least p that so many seeds can give."""


@dataclass(frozen=True)
class MetricComparison:
    """All metrics of all arms."""

    rows: list[MetricRow]
    pairs: list[PairedDifference]
    notes: list[str]
    discrepancies: list[str]


# Metric -> seed -> score, of one arm.
SeedScores = dict[Metric, dict[str, float]]


def compare_metrics(arms: Sequence[Arm]) -> MetricComparison:
    """Means and intervals of every arm, and the paired differences of every two arms with two common seeds."""
    notes: list[str] = []
    problems: list[str] = []
    read = {run.label: run_scores(run, notes, problems) for arm in arms for run in arm.runs}
    found, sizes, other_sets = tell_sets_apart(read)
    first_of: dict[Metric, Measure] = {}
    for each in found.values():
        first_of |= {metric: measure for metric, measure in each.items() if metric not in first_of}
    scores = {arm.name: _arm_scores(arm, found, notes) for arm in arms}
    rows = [
        MetricRow(
            metric,
            measure.chance,
            measure.majority,
            {name: mean_interval(list(of[metric].values())) for name, of in scores.items() if metric in of},
        )
        for metric, measure in first_of.items()
    ]
    pairs = [pair for first, second in combinations(scores, 2) for pair in paired_differences(first, second, scores)]
    notes += _seed_notes(scores, pairs)
    return MetricComparison(rows, pairs, [*sizes, *notes], [*problems, *other_sets])


def paired_differences(first: str, second: str, scores: Mapping[str, SeedScores]) -> list[PairedDifference]:
    """One entry per metric that both arms have with at least two common seeds; Holm's correction over these."""
    found = []
    for metric, of_first in scores[first].items():
        of_second = scores[second].get(metric, {})
        seeds = [seed for seed in of_first if seed in of_second]
        if len(seeds) > 1:
            found.append((metric, seeds, [of_second[seed] - of_first[seed] for seed in seeds]))
    p_values = [sign_flip_p(differences) for _, _, differences in found]
    return [
        PairedDifference(
            first,
            second,
            metric,
            seeds,
            differences,
            mean_interval(differences),
            p,
            adjusted,
            smallest_sign_flip_p(len(seeds)),
        )
        for (metric, seeds, differences), p, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]


def _arm_scores(arm: Arm, scores: Mapping[str, dict[Metric, Measure]], notes: list[str]) -> SeedScores:
    """Scores of an arm by metric and seed, from those of all runs by label; adds what is odd to `notes`."""
    values: dict[Metric, dict[str, list[float]]] = {}
    by_seed: dict[str, list[str]] = {}
    for run in arm.runs:
        # A seed that is not known pairs with nothing.
        seed = f"unknown, of {run.label}" if run.seed is None else str(run.seed)
        if scores[run.label]:
            by_seed.setdefault(seed, []).append(run.label)
        for metric, measure in scores[run.label].items():
            values.setdefault(metric, {}).setdefault(seed, []).append(measure.value)
    for seed, labels in by_seed.items():
        if len(labels) > 1:
            notes.append(f"{arm.name}: {', '.join(labels)} have the same seed {seed}; their mean counts as one value.")
    return {metric: {seed: sum(each) / len(each) for seed, each in seeds.items()} for metric, seeds in values.items()}


def _seed_notes(scores: Mapping[str, SeedScores], pairs: Sequence[PairedDifference]) -> list[str]:
    """What the number of seeds allows to say."""
    single = [name for name, of in scores.items() if of and max(map(len, of.values())) == 1]
    notes = []
    if single:
        notes.append(
            f"One seed only, so no interval: {', '.join(single)}. How much another seed would change is unknown."
        )
    paired = {(pair.first, pair.second) for pair in pairs}
    for first, second in combinations([name for name, of in scores.items() if of], 2):
        if (first, second) not in paired:
            notes.append(f"{first} and {second}: fewer than two common seeds, so no test of their difference.")
    for n in sorted({len(pair.seeds) for pair in pairs}):
        least, tests = smallest_sign_flip_p(n), max(_family_sizes(pairs, n))
        corrected = min(1.0, tests * least)
        how = f"2/2^{n}" if n <= EXACT_UP_TO else "by the number of draws"
        note = f"With {n} common seeds the smallest p that can be reached is {least:.2g} ({how}), "
        note += f"and {corrected:.2g} after Holm's correction over {tests} metrics"
        if corrected > 0.05:
            note += ": no difference, however large, comes below 0.05. That is not a sign of no difference"
        notes.append(f"{note}. Read the intervals.")
    return notes


def _family_sizes(pairs: Sequence[PairedDifference], n: int) -> list[int]:
    """The numbers of metrics tested for each pair of arms that has `n` common seeds."""
    sizes: dict[tuple[str, str], int] = {}
    for pair in pairs:
        sizes[pair.first, pair.second] = sizes.get((pair.first, pair.second), 0) + 1
    return [sizes[pair.first, pair.second] for pair in pairs if len(pair.seeds) == n]
