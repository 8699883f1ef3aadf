"""Scores of the arms with their intervals over seeds, and paired differences between arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from neuclip_scale.comparison.arms import Arm
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.text import listed, number, show
from neuclip_scale.evaluation.measures import Measure, measures
from neuclip_scale.evaluation.statistics import (
    EXACT_UP_TO,
    Estimate,
    holm,
    mean_interval,
    sign_flip_p,
    smallest_sign_flip_p,
)


class Metric(NamedTuple):
    """One score of one evaluation set."""

    set_name: str
    label: str


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
    found = {run.label: run_scores(run, notes, problems) for arm in arms for run in arm.runs}
    problems += _tell_sets_apart(found)
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
    return MetricComparison(rows, pairs, notes, problems)


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


def run_scores(run: RunFolder, notes: list[str], problems: list[str]) -> dict[Metric, Measure]:
    """The scores in a run's summary. That there are none goes to `notes`, what cannot be used to `problems`."""
    evaluation = (run.summary or {}).get("evaluation")
    if not evaluation or not isinstance(evaluation, dict):
        notes.append(f"{run.label}: no evaluation in summary.json; it has no part in the metrics.")
        return {}
    found: dict[Metric, Measure] = {}
    for name, scores in evaluation.items():
        try:
            each_set = list(measures({name: scores}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__} {error}"
            problems.append(f"{run.label}: summary.json, evaluation {name}: cannot be read ({reason}); left out.")
            continue
        for measure in each_set:
            value, chance = number(measure.value), number(measure.chance)
            if value is None or chance is None:
                told = f"{measure.label} = {show(measure.value)}, chance {show(measure.chance)}"
                problems.append(f"{run.label}: summary.json, {name}, {told}: not numbers; left out.")
            else:
                majority = number(measure.majority)
                found[Metric(name, measure.label)] = measure._replace(value=value, chance=chance, majority=majority)
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


def _tell_sets_apart(found: dict[str, dict[Metric, Measure]]) -> list[str]:
    """Number, in place, the sets that have a name in common but other sizes or another chance; says which do."""
    versions: dict[str, dict[object, list[str]]] = {}
    for label, scores in found.items():
        renamed: dict[Metric, Measure] = {}
        for name in dict.fromkeys(metric.set_name for metric in scores):
            mine = {metric: measure for metric, measure in scores.items() if metric.set_name == name}
            # Rounded, as another machine may add in another order.
            size = tuple((each.label, f"{each.chance:.9g}", f"{each.majority or 0:.9g}") for each in mine.values())
            known = versions.setdefault(name, {})
            known.setdefault(size, []).append(label)
            place = list(known).index(size)
            shown = name if place == 0 else f"{name} (version {place + 1})"
            renamed |= {metric._replace(set_name=shown): measure for metric, measure in mine.items()}
        found[label] = renamed
    notes = []
    evaluated = [label for label, scores in found.items() if scores]
    for name, known in versions.items():
        if len(known) > 1:
            groups = "; ".join(", ".join(labels) for labels in known.values())
            notes.append(f"Evaluation set {name} is not the same for all ({groups}): scores stand in separate rows.")
        missing = [label for label in evaluated if label not in {each for labels in known.values() for each in labels}]
        if missing:
            notes.append(f"Evaluation set {name}: no scores of {listed(missing)}.")
    return notes
