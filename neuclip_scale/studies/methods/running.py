"""Runs what a study plans, one `neuclip train` after the other, and keeps what is finished."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuclip_scale.files import write_json
from neuclip_scale.studies.methods.plan import Run, base_recipe, planned, steps_for_samples, steps_for_seconds
from neuclip_scale.studies.methods.settings import MethodsStudy

Report = Callable[[str], None]


class StudyError(RuntimeError):
    """Runs of a study failed; the message lists them."""


def run_study(study: MethodsStudy, report: Report) -> dict[str, list[Path]]:
    """Train what is missing; returns the run folders of each budget. Raises `ConfigError`, `StudyError`.

    A run that fails does not end the study: the others are run first, and the failures raised together.
    """
    recipe = base_recipe(study)
    steps = steps_for_samples(study, recipe)
    folders: dict[str, list[Path]] = {}
    failed: list[str] = []
    plan: dict[str, Any] = {}
    for budget in ("samples", "seconds"):
        if budget not in study.budgets:
            continue
        if budget == "seconds":
            summaries = _summaries(planned(study, recipe, "samples", steps))
            steps, seconds = steps_for_seconds(study, recipe, summaries)
            plan["seconds"] = seconds
        runs = planned(study, recipe, budget, steps)
        plan[budget + "_steps"] = steps
        write_json(study.output / "plan.json", plan)
        for number, run in enumerate(runs, start=1):
            failed += _train(study, run, f"{budget} {number}/{len(runs)}", report)
        folders[budget] = [run.folder for run in runs if finished(run.folder)]
        if failed:
            raise StudyError(f"{len(failed)} run(s) failed: {'; '.join(failed)}. Mend the cause and run again.")
    return folders


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run."""
    path = folder / "summary.json"
    summary = json.loads(path.read_bytes()) if path.is_file() else {}
    return summary if summary.get("status") == "finished" else None


def command(study: MethodsStudy, run: Run) -> list[str]:
    """The command line of one run."""
    own = [f"{name}={json.dumps(value)}" for name, value in run.overrides.items()]
    data = [f"data.train={json.dumps(study.data)}"] if study.data else []
    alone = [sys.executable, "-m", "neuclip_scale"]
    program = [*shlex.split(study.launcher), "neuclip"] if study.launcher else alone
    return [*program, "train", study.recipe, *study.overrides, *data, *own, *run.arm.changes]


def _train(study: MethodsStudy, run: Run, label: str, report: Report) -> list[str]:
    """Train one run unless it is finished; returns what went wrong, if anything."""
    if finished(run.folder):
        report(f"{label} {run.arm.name} seed {run.seed}: kept from before")
        return []
    report(f"{label} {run.arm.name} seed {run.seed}: training, {run.overrides['train.num_steps']} steps")
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "console.txt", "a", encoding="utf-8") as console:
        done = subprocess.run(command(study, run), stdout=console, stderr=subprocess.STDOUT, check=False)
    if done.returncode == 0:
        return []
    lines = (run.folder / "console.txt").read_text("utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    return [f"{run.folder} (exit status {done.returncode}: {last})"]


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
