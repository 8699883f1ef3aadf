"""Runs what a study plans, and keeps what is finished and the plan itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from neuclip_scale.config import ConfigError, check_launcher
from neuclip_scale.evaluation.measures import measures
from neuclip_scale.files import write_json
from neuclip_scale.run_folder import read_object, summary_status
from neuclip_scale.studies.methods.plan import (
    Choice,
    Run,
    base_recipe,
    check_study,
    planned,
    steps_for_samples,
    steps_for_seconds,
    tuning_runs,
)
from neuclip_scale.studies.methods.settings import Budget, MethodsStudy
from neuclip_scale.studies.methods.training import Report, Trainings, command, finished, unusable

__all__ = ["StudyError", "command", "run_study", "saved_plan"]

Folders = dict[str, list[Path]]


class StudyError(RuntimeError):
    """Runs of a study failed; the message lists them."""

    def __init__(self, message: str, complete: Folders | None = None) -> None:
        super().__init__(message)
        self.complete = complete or {}
        """Budget -> folders of its runs that are finished all the same."""


def run_study(study: MethodsStudy, report: Report) -> Folders:
    """Train what is missing; returns the run folders of each budget.

    A run that fails does not end the study: the others are run first, and the failures raised together. Raises
    `ConfigError`, `StudyError`, `StudyStoppedError`.
    """
    check_study(study)
    check_launcher(study.launcher)
    recipe = base_recipe(study)
    all_steps = steps_for_samples(study, recipe)
    tuning = tuning_runs(study, recipe, all_steps)
    plan = saved_plan(study.output)
    folders: Folders = {}
    with Trainings(study, report) as trainings:
        chosen, failed = _choose(tuning, plan, trainings)
        # An arm whose settings could not be chosen is left out.
        steps = {name: number for name, number in all_steps.items() if name in chosen or name not in tuning}
        for budget in get_args(Budget):
            if budget not in study.budgets:
                continue
            if budget == "seconds":
                summaries = _summaries(study, planned(study, recipe, "samples", steps, chosen))
                steps, plan["seconds"] = steps_for_seconds(study, recipe, summaries, plan)
                failed |= {name: _no_speed(name) for name in summaries if name not in steps}
            runs = planned(study, recipe, budget, steps, chosen)
            plan[budget + "_steps"] = plan.get(budget + "_steps", {}) | steps
            write_json(study.output / "plan.json", plan)
            problems = trainings.train(budget, runs)
            failed |= {str(folder): problem for folder, problem in problems.items()}
            folders[budget] = [run.folder for run in runs if run.folder not in problems]
    if failed:
        listed = "; ".join(failed.values())
        raise StudyError(f"{len(failed)} run(s) failed: {listed}. Mend the cause and run again.", folders)
    return folders


def saved_plan(output: Path) -> dict[str, Any]:
    """What plan.json has of an earlier start: choices, and steps and seconds of the budgets; empty before the first.

    Raises `ConfigError` for a file that is not whole.
    """
    path = output / "plan.json"
    try:
        plan = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(
            "output", str(output), f"plan.json, by which it goes on, is not whole ({error})",
            "Restore it, or remove it together with runs/seconds.",
        ) from error  # fmt: skip
    return dict(plan)


def _choose(
    tuning: Mapping[str, Mapping[Choice, Run]], plan: dict[str, Any], trainings: Trainings
) -> tuple[dict[str, Choice], dict[str, str]]:
    """What each arm goes on with, noted in `plan`, and what went wrong; a run that diverged is the worst choice."""
    problems = trainings.train("tuning", [run for of_arm in tuning.values() for run in of_arm.values()])
    chosen: dict[str, Choice] = {}
    failed: dict[str, str] = {}
    tuned: dict[str, dict[str, float | None]] = {}
    for arm, of_arm in tuning.items():
        scores: dict[Choice, float | None] = {}
        wrong = {}
        for choice, run in of_arm.items():
            if run.folder in trainings.diverged:
                scores[choice] = None
            elif run.folder in problems:
                wrong[str(run.folder)] = problems[run.folder]
            else:
                scores[choice] = _mean_score(run)
        good = {choice: score for choice, score in scores.items() if score is not None}
        if wrong or not good:
            failed |= wrong or {arm: f"{arm}: every choice diverged; give lower --learning-rates"}
            continue
        chosen[arm] = max(good, key=lambda choice: good[choice])
        tuned[arm] = {choice.label: score for choice, score in scores.items()}
        trainings.report(f"chosen for {arm}: {chosen[arm].label} ({_told(scores, chosen[arm])})")
    plan["chosen"] = {arm: asdict(choice) for arm, choice in chosen.items()}
    plan["tuning"] = tuned
    return chosen, failed


def _no_speed(arm: str) -> str:
    return (
        f"budget seconds: {arm} has no finished run at equal samples, whose speed sets the steps; "
        "`samples` in --budgets trains it"
    )


def _mean_score(run: Run) -> float:
    """Mean of all held-out scores of a finished run, recalls and accuracies alike; raises `StudyError` without any."""
    scores = [measure.value for measure in measures((finished(run.folder) or {}).get("evaluation", {}))]
    if not scores:
        raise StudyError(f"{run.folder} has no evaluation to choose settings by. Give evaluation.data.")
    return statistics.mean(scores)


def _told(scores: Mapping[Choice, float | None], best: Choice) -> str:
    values = ((choice, "diverged" if score is None else f"{100 * score:.2f} %") for choice, score in scores.items())
    told = ", ".join(f"{choice.label}: {value}" for choice, value in values)
    edges = [name for name, value in asdict(best).items() if _at_edge(value, {asdict(each)[name] for each in scores})]
    return told + "".join(f"; {name} at the edge of what was tried" for name in edges)


def _at_edge(value: Any, tried: set[Any]) -> bool:
    return len(tried) > 1 and value in (min(tried), max(tried))


def _summaries(study: MethodsStudy, runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """Summaries of the finished runs at equal samples, by arm; a file that is not whole counts as no run, and so does a
    run of other settings, whose speed is another.
    """
    found: dict[str, list[dict[str, Any]]] = {run.arm.name: [] for run in runs}
    for run in runs:
        if summary_status(run.folder) == "finished" and not unusable(study, run):
            found[run.arm.name].append(read_object(run.folder / "summary.json"))
    return found
