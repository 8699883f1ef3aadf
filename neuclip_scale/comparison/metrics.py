"""Scores of the arms with their intervals over seeds, and paired differences between arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from neuclip_scale.comparison.arms import Arm
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.text import number
from neuclip_scale.evaluation.measures import Measure, measures
from neuclip_scale.evaluation.statistics import (
    Estimate,
    holm,
    mean_interval,
    sign_flip_p,
    smallest_sign_flip_p,
)


class Metric(NamedTuple):
    """One score of one evaluation set. The label holds the set's size: sets of other sizes are other metrics."""

    set_name: str
    label: str


@dataclass(frozen=True)
class MetricRow:
    """One metric over all arms; fractions."""

    metric: Metric
    chance: float | None
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
    first_of: dict[Metric, Measure] = {}
    scores = {arm.name: _arm_scores(arm, first_of, notes) for arm in arms}
    rows = [
        MetricRow(
            metric,
            number(measure.chance),
            number(measure.majority),
            {name: mean_interval(list(of[metric].values())) for name, of in scores.items() if metric in of},
        )
        for metric, measure in first_of.items()
    ]
    pairs = [pair for first, second in combinations(scores, 2) for pair in paired_differences(first, second, scores)]
    notes += _seed_notes(scores, pairs)
    return MetricComparison(rows, pairs, notes, _different_sets(arms))


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


def _arm_scores(arm: Arm, first_of: dict[Metric, Measure], notes: list[str]) -> SeedScores:
    """Scores by metric and seed; adds new metrics to `first_of` and what is odd to `notes`."""
    values: dict[Metric, dict[str, list[float]]] = {}
    by_seed: dict[str, list[str]] = {}
    for run in arm.runs:
        # A seed that is not known pairs with nothing.
        seed = f"unknown, of {run.label}" if run.seed is None else str(run.seed)
        found = _run_scores(run, notes)
        if found:
            by_seed.setdefault(seed, []).append(run.label)
        for metric, measure in found.items():
            first_of.setdefault(metric, measure)
            values.setdefault(metric, {}).setdefault(seed, []).append(measure.value)
    for seed, labels in by_seed.items():
        if len(labels) > 1:
            notes.append(f"{arm.name}: {', '.join(labels)} have the same seed {seed}; their mean counts as one value.")
    return {metric: {seed: sum(each) / len(each) for seed, each in seeds.items()} for metric, seeds in values.items()}


def _run_scores(run: RunFolder, notes: list[str]) -> dict[Metric, Measure]:
    """The scores in a run's summary; sets and values that cannot be used are named in `notes`."""
    evaluation = (run.summary or {}).get("evaluation")
    if not evaluation or not isinstance(evaluation, dict):
        notes.append(f"{run.label}: no evaluation in summary.json; it has no part in the metrics.")
        return {}
    found: dict[Metric, Measure] = {}
    for name, scores in evaluation.items():
        try:
            each_set = list(measures({name: scores}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            notes.append(
                f"{run.label}: summary.json, evaluation {name}: cannot be read ({type(error).__name__} {error})."
            )
            continue
        for measure in each_set:
            value = number(measure.value)
            if value is None:
                notes.append(f"{run.label}: {name}, {measure.label} = {measure.value!r}: not a number; left out.")
            else:
                found[Metric(name, measure.label)] = measure._replace(value=value)
    return found


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
        notes.append(
            f"With {n} common seeds no p below {least:.2g} can be reached (2/2^{n}; after Holm's correction over "
            f"{tests} metrics {min(1.0, tests * least):.2g}), however large the difference: "
            "a p above 0.05 is then no sign of no difference. Read the interval."
        )
    return notes


def _family_sizes(pairs: Sequence[PairedDifference], n: int) -> list[int]:
    """The numbers of metrics tested for each pair of arms that has `n` common seeds."""
    sizes: dict[tuple[str, str], int] = {}
    for pair in pairs:
        sizes[pair.first, pair.second] = sizes.get((pair.first, pair.second), 0) + 1
    return [sizes[pair.first, pair.second] for pair in pairs if len(pair.seeds) == n]


def _different_sets(arms: Sequence[Arm]) -> list[str]:
    """Runs evaluated on other sets than the first evaluated run."""
    found: dict[str, set[Metric]] = {}
    for run in (run for arm in arms for run in arm.runs):
        metrics = set(_run_scores(run, []))
        if metrics:
            found[run.label] = metrics
    if len({frozenset(metrics) for metrics in found.values()}) < 2:
        return []
    common = set.intersection(*found.values())
    extra = {label: sorted({metric.set_name for metric in metrics - common}) for label, metrics in found.items()}
    shown = "; ".join(f"{label}: {', '.join(names)}" for label, names in extra.items() if names)
    return [f"Evaluated on different sets, or sets of different sizes: {shown}. Only what is common can be compared."]
