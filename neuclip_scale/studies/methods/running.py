"""Runs what a study plans, one `neuclip train` after the other, and keeps what is finished."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from neuclip_scale.comparison.recipe_file import read_recipe, recipe_fields
from neuclip_scale.config import load_recipe
from neuclip_scale.evaluation.measures import measures
from neuclip_scale.files import write_json
from neuclip_scale.studies.methods.plan import (
    Choice,
    Run,
    base_recipe,
    planned,
    steps_for_samples,
    steps_for_seconds,
    tuning_runs,
)
from neuclip_scale.studies.methods.settings import Budget, MethodsStudy

Report = Callable[[str], None]


class StudyError(RuntimeError):
    """Runs of a study failed; the message lists them."""


def run_study(study: MethodsStudy, report: Report) -> dict[str, list[Path]]:
    """Train what is missing; returns the run folders of each budget. Raises `ConfigError`, `StudyError`.

    A run that fails does not end the study: the others are run first, and the failures raised together.
    """
    recipe = base_recipe(study)
    steps = steps_for_samples(study, recipe)
    plan: dict[str, Any] = {}
    tuning = tuning_runs(study, recipe, steps)
    _train_all(study, "tuning", [run for of_arm in tuning.values() for run in of_arm.values()], report)
    tuned = {arm: {choice: _mean_score(run) for choice, run in of_arm.items()} for arm, of_arm in tuning.items()}
    chosen = {arm: max(scores, key=lambda choice: scores[choice]) for arm, scores in tuned.items()}
    for arm, scores in tuned.items():
        report(f"chosen for {arm}: {chosen[arm].label} ({_told(scores, chosen[arm])})")
    plan["chosen"] = {arm: asdict(choice) for arm, choice in chosen.items()}
    plan["tuning"] = {arm: {choice.label: score for choice, score in scores.items()} for arm, scores in tuned.items()}
    folders: dict[str, list[Path]] = {}
    for budget in get_args(Budget):
        if budget not in study.budgets:
            continue
        if budget == "seconds":
            summaries = _summaries(planned(study, recipe, "samples", steps, chosen))
            steps, seconds = steps_for_seconds(study, recipe, summaries)
            plan["seconds"] = seconds
        runs = planned(study, recipe, budget, steps, chosen)
        plan[budget + "_steps"] = steps
        write_json(study.output / "plan.json", plan)
        _train_all(study, budget, runs, report)
        folders[budget] = [run.folder for run in runs]
    return folders


def _train_all(study: MethodsStudy, budget: str, runs: list[Run], report: Report) -> None:
    """Train what is not finished, `study.jobs` at a time; raises `StudyError` with all that failed."""
    with ThreadPoolExecutor(study.jobs) as pool:
        labels = [f"{budget} {number}/{len(runs)}" for number in range(1, len(runs) + 1)]
        parts = pool.map(lambda run, label: _train(study, run, label, report), runs, labels)
        failed = [text for part in parts for text in part]
    if failed:
        raise StudyError(f"{len(failed)} run(s) failed: {'; '.join(failed)}. Mend the cause and run again.")


def _mean_score(run: Run) -> float:
    """Mean of all held-out scores of a finished run, recalls and accuracies alike; raises `StudyError` without any."""
    scores = [measure.value for measure in measures((finished(run.folder) or {}).get("evaluation", {}))]
    if not scores:
        raise StudyError(f"{run.folder} has no evaluation to choose settings by. Give evaluation.data.")
    return statistics.mean(scores)


def _told(scores: Mapping[Choice, float], best: Choice) -> str:
    told = ", ".join(f"{choice.label}: {100 * score:.2f} %" for choice, score in scores.items())
    edges = [name for name, value in asdict(best).items() if _at_edge(value, {asdict(each)[name] for each in scores})]
    return told + "".join(f"; {name} at the edge of what was tried" for name in edges)


def _at_edge(value: Any, tried: set[Any]) -> bool:
    return len(tried) > 1 and value in (min(tried), max(tried))


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run."""
    path = folder / "summary.json"
    summary = json.loads(path.read_bytes()) if path.is_file() else {}
    return summary if summary.get("status") == "finished" else None


def command(study: MethodsStudy, run: Run) -> list[str]:
    """The command line of one run."""
    alone = [sys.executable, "-m", "neuclip_scale"]
    program = [*shlex.split(study.launcher), "neuclip"] if study.launcher else alone
    return [*program, "train", study.recipe, *_all_overrides(study, run)]


def _all_overrides(study: MethodsStudy, run: Run) -> list[str]:
    """`section.field=value` of one run, what it says for itself last."""
    own = [f"{name}={json.dumps(value)}" for name, value in run.overrides.items()]
    data = [f"data.train={json.dumps(study.data)}"] if study.data else []
    return [*study.overrides, *data, *own, *run.arm.changes]


def _train(study: MethodsStudy, run: Run, label: str, report: Report) -> list[str]:
    """Train one run unless it is finished; returns what went wrong, if anything."""
    if finished(run.folder):
        different = _other_recipe(study, run)
        if different:
            return [f"{run.folder} was trained with another {different}; remove it, or give another --output"]
        report(f"{label} {run.arm.name} seed {run.seed}: kept from before")
        return []
    report(f"{label} {run.arm.name} seed {run.seed}: training, {run.overrides['train.num_steps']} steps")
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if study.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // study.jobs)))
    with open(run.folder / "console.txt", "a", encoding="utf-8") as console:
        done = subprocess.run(
            command(study, run), stdout=console, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode == 0:
        return []
    lines = (run.folder / "console.txt").read_text("utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    return [f"{run.folder} (exit status {done.returncode}: {last})"]


def _other_recipe(study: MethodsStudy, run: Run) -> str:
    """The fields in which a finished run is not what is planned now; empty when it is."""
    asked = recipe_fields(load_recipe(study.recipe, _all_overrides(study, run)))
    trained, _ = read_recipe(run.folder / "config.yaml")
    return ", ".join(sorted(name for name, value in asked.items() if trained.fields.get(name) != value))


def _summaries(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """Summaries of the finished runs at equal samples, by arm; raises `StudyError` where an arm has none."""
    found: dict[str, list[dict[str, Any]]] = {run.arm.name: [] for run in runs}
    for run in runs:
        summary = finished(run.folder)
        if summary:
            found[run.arm.name].append(summary)
    missing = [name for name, part in found.items() if not part]
    if missing:
        raise StudyError(
            f"budget seconds: {', '.join(missing)} has no finished run at equal samples, whose speed sets the steps. "
            "Add `samples` to --budgets."
        )
    return found
