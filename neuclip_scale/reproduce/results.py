"""What the finished stages and runs say, gathered for the report. Nothing that is missing is filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuclip_scale.evaluation.measures import measures
from neuclip_scale.evaluation.statistics import Estimate, holm, mean_interval, sign_flip_p
from neuclip_scale.reproduce.request import Request
from neuclip_scale.run_folder import read_object

AVERAGE = "Average"
"""DataComp's, over 38 tasks: the score that was published."""


@dataclass(frozen=True)
class RunResult:
    """One run."""

    method: str
    seed: int
    summary: dict[str, Any]
    """Empty where it is not finished."""
    scores: dict[str, float]
    """Score -> value in points; empty where it was not evaluated."""
    missing: tuple[str, ...]
    """Tasks of DataComp that were not evaluated."""

    @property
    def cost(self) -> Mapping[str, Any]:
        """What summary.json holds of it."""
        return self.summary.get("cost") or {}


@dataclass(frozen=True)
class Results:
    """A reproduction as far as it has come."""

    request: Request
    records: dict[str, dict[str, Any]]
    """Stage -> its record; stages that are not done are left out."""
    runs: dict[str, RunResult]

    def of(self, stage: str) -> dict[str, Any]:
        """The result of a stage; empty where it is not done."""
        return dict(self.records.get(stage, {}).get("result", {}))

    def by_seed(self, method: str, score: str) -> dict[int, float]:
        """Seed -> score of the runs that have it."""
        runs = [run for run in self.runs.values() if run.method == method and score in run.scores]
        return {run.seed: run.scores[score] for run in runs}

    def estimate(self, method: str, score: str) -> Estimate | None:
        """Mean with Student's 95 % interval over the seeds; None where no run has the score."""
        values = list(self.by_seed(method, score).values())
        return mean_interval(values) if values else None

    @property
    def scores(self) -> list[str]:
        """All scores that some run has, in the order of the evaluation."""
        return list(dict.fromkeys(name for run in self.runs.values() for name in run.scores))


@dataclass(frozen=True)
class Paired:
    """One method less another in one score, over their common seeds, in points."""

    score: str
    estimate: Estimate
    p: float
    p_holm: float


def paired(results: Results, method: str, reference: str) -> list[Paired]:
    """Every score that both have with two common seeds; Holm's correction over these."""
    found = []
    for score in results.scores:
        own, other = results.by_seed(method, score), results.by_seed(reference, score)
        seeds = [seed for seed in own if seed in other]
        if len(seeds) > 1:
            found.append((score, [own[seed] - other[seed] for seed in seeds]))
    p_values = [sign_flip_p(differences) for _, differences in found]
    corrected = holm(p_values)
    return [
        Paired(score, mean_interval(differences), p, p_holm)
        for (score, differences), p, p_holm in zip(found, p_values, corrected, strict=True)
    ]


def gather(request: Request, records: Mapping[str, dict[str, Any]]) -> Results:
    """Read what there is; `records`: stage -> what it left, of those that are done."""
    places = request.places
    runs = {}
    for label, (method, seed) in request.labels.items():
        summary = read_object(places.run(label) / "summary.json") if f"train/{label}" in records else {}
        evaluation = read_object(places.evaluation(label)) if summary and _is_of(label, request) else {}
        scores, missing = _scores(evaluation)
        runs[label] = RunResult(method, seed, summary, scores, missing)
    return Results(request, dict(records), runs)


def _is_of(label: str, request: Request) -> bool:
    """Whether the evaluation there is of the training there, and not of one before it."""
    evaluation, summary = request.places.evaluation(label), request.places.run(label) / "summary.json"
    return evaluation.exists() and evaluation.stat().st_mtime >= summary.stat().st_mtime


def _scores(evaluation: Mapping[str, Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """(scores in points, tasks without one) of what `neuclip evaluate --json` wrote."""
    if "averages" not in evaluation:
        return {f"{m.set_name} {m.label}": 100 * m.value for m in measures(evaluation.get("evaluation", {}))}, ()
    averages = {name: found["value"] for name, found in evaluation["averages"].items()}
    tasks = {task["dataset"]: task["value"] for task in evaluation["tasks"]}
    values = {name: 100 * value for name, value in {**averages, **tasks}.items() if value is not None}
    without = [*evaluation["missing"], *evaluation["failed"], *evaluation["incomplete"]]
    return values, tuple(dict.fromkeys(each["key"] for each in without))
