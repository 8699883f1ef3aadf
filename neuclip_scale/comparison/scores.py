"""The scores in summary.json, with sets that only share a name told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.evaluation.measures import Measure, measures, set_sizes
from neuclip_scale.untrusted_text import listed, number, show


class Metric(NamedTuple):
    """One score of one evaluation set."""

    set_name: str
    label: str


class RunScores(NamedTuple):
    """What one run's summary says."""

    measures: dict[Metric, Measure]
    sizes: dict[str, str]
    """Set -> its size in words."""
    guesses: dict[str, tuple[str, ...]]
    """Set -> its prompts, and every score that it has with what guessing gives, also of scores that are not finite."""


def run_scores(run: RunFolder, notes: list[str], problems: list[str]) -> RunScores:
    """The scores in a run's summary. That there are none goes to `notes`, what cannot be used to `problems`."""
    read = RunScores({}, {}, {})
    evaluation = (run.summary or {}).get("evaluation")
    if not evaluation or not isinstance(evaluation, dict):
        notes.append(f"{run.label}: no evaluation in summary.json; it has no part in the metrics.")
        return read
    for name, scores in evaluation.items():
        try:
            each_set, size = list(measures({name: scores})), set_sizes({name: scores})
            prompts = f"{show(scores.get('num_templates'))} templates"
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__} {error}"
            problems.append(f"{run.label}: summary.json, evaluation {name}: cannot be read ({reason}); left out.")
            continue
        read.sizes[name] = size
        read.guesses[name] = (prompts, *(_guesses(measure) for measure in each_set))
        for measure in each_set:
            value, chance = number(measure.value), number(measure.chance)
            if value is None or chance is None:
                told = f"{measure.label} = {show(measure.value)}, chance {show(measure.chance)}"
                problems.append(f"{run.label}: summary.json, {name}, {told}: not finite numbers; left out.")
            else:
                majority = number(measure.majority)
                known = measure._replace(value=value, chance=chance, majority=majority)
                read.measures[Metric(name, measure.label)] = known
    return read


def _guesses(measure: Measure) -> str:
    """Which score it is and what guessing gives, rounded, as another machine may add in another order."""
    values = (number(value) for value in (measure.chance, measure.majority))
    return ", ".join([measure.label, *("none" if value is None else f"{value:.9g}" for value in values)])


def tell_sets_apart(found: Mapping[str, RunScores]) -> tuple[dict[str, dict[Metric, Measure]], list[str], list[str]]:
    """(scores by run in which sets of one name but other sizes, prompts or another chance are numbered, the size of
    each set, sentences about sets that are not the same for all)."""
    versions: dict[str, dict[object, list[str]]] = {}
    scores: dict[str, dict[Metric, Measure]] = {label: {} for label in found}
    sizes: dict[str, str] = {}
    for label, of_run in found.items():
        for name, size in of_run.sizes.items():
            mine = {metric: measure for metric, measure in of_run.measures.items() if metric.set_name == name}
            identity = (size, of_run.guesses[name])
            known = versions.setdefault(name, {})
            known.setdefault(identity, []).append(label)
            place = list(known).index(identity)
            shown = name if place == 0 else f"{name} (version {place + 1})"
            sizes[shown] = size.removeprefix(f"{name}: ")
            scores[label] |= {metric._replace(set_name=shown): measure for metric, measure in mine.items()}
    return scores, [f"{name}: {size}." for name, size in sizes.items()], _set_problems(versions, scores)


def _set_problems(
    versions: Mapping[str, Mapping[object, list[str]]], scores: Mapping[str, dict[Metric, Measure]]
) -> list[str]:
    problems = []
    evaluated = [label for label, of_run in scores.items() if of_run]
    for name, known in versions.items():
        if len(known) > 1:
            groups = "; ".join(", ".join(labels) for labels in known.values())
            problems.append(f"Evaluation set {name} is not the same for all ({groups}): scores stand in separate rows.")
        missing = [label for label in evaluated if label not in {each for labels in known.values() for each in labels}]
        if missing:
            problems.append(f"Evaluation set {name}: no scores of {listed(missing)}.")
    return problems
