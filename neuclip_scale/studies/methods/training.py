"""The trainings of a study: one `neuclip train` for each run, and what its folder tells before and after."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from neuclip_scale.comparison.recipe_file import read_recipe
from neuclip_scale.config import PLACES, load_recipe, recipe_fields
from neuclip_scale.run_folder import newest_checkpoint
from neuclip_scale.studies.methods.plan import Run
from neuclip_scale.studies.methods.settings import MethodsStudy
from neuclip_scale.untrusted_text import plain

Report = Callable[[str], None]

_DIVERGED = "{} diverged, see console.txt there; lower its optim.learning_rate"


class StudyStoppedError(RuntimeError):
    """A signal ended a study; its trainings have saved what they had."""


class Trainings:
    """Trains runs, `study.jobs` at a time. As a context, SIGTERM and SIGUSR1 end those under way, which save first."""

    def __init__(self, study: MethodsStudy, report: Report) -> None:
        self.study, self.report = study, report
        self.stopped_by = ""
        self.diverged: set[Path] = set()
        """Folders of runs that a loss or gradient ended which was not finite."""
        self._under_way: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # the handler may be interrupted by a second signal
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Trainings:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def train(self, budget: str, runs: Sequence[Run]) -> dict[Path, str]:
        """Train what is not finished; returns what went wrong, by folder. Raises `StudyStoppedError`."""
        labels = [f"{budget} {number}/{len(runs)}" for number in range(1, len(runs) + 1)]
        with ThreadPoolExecutor(self.study.jobs) as pool:
            try:
                problems = list(pool.map(self._train, runs, labels))
            except BaseException:  # an interrupt: the pool's end waits for what is under way
                self._stop("an error")
                raise
        if self.stopped_by:
            raise StudyStoppedError(
                f"stopped by {self.stopped_by}; trainings under way have saved. Run the same command again to go on."
            )
        return {run.folder: problem for run, problem in zip(runs, problems, strict=True) if problem}

    def _train(self, run: Run, label: str) -> str:
        """Train one run unless it is finished; returns what went wrong, if anything."""
        told = f"{label} {run.arm.name} seed {run.seed}"
        problem = unusable(self.study, run)
        if problem or self.stopped_by:
            return problem
        if finished(run.folder):
            self.report(f"{told}: kept from before")
            return ""
        if run.budget == "tuning" and self._has_diverged(run.folder):
            return _DIVERGED.format(run.folder)
        self.report(f"{told}: training, {run.overrides['train.num_steps']} steps")
        run.folder.mkdir(parents=True, exist_ok=True)
        # What still writes into an earlier one, left behind by a killed study, is not taken for this run's.
        path = run.folder / "console.txt"
        if path.exists():
            path.rename(path.with_name(f"console-{len(list(run.folder.glob('console*.txt')))}.txt"))
        with open(path, "wb") as console:
            status = self._run(command(self.study, run), console)
        if status == 0 or self.stopped_by:
            return ""
        if self._has_diverged(run.folder):
            return _DIVERGED.format(run.folder)
        lines = path.read_text("utf-8", errors="replace").strip().splitlines()
        return f"{run.folder} (exit status {status}: {lines[-1] if lines else ''})"

    def _has_diverged(self, folder: Path) -> bool:
        found = any(folder.glob("nonfinite_step_*.json"))
        if found:
            self.diverged.add(folder)
        return found

    def _run(self, words: list[str], console: Any) -> int:
        environment = dict(os.environ)
        if self.study.jobs > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.study.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with self._lock:
            if self.stopped_by:
                return 0
            process = subprocess.Popen(words, stdout=console, stderr=subprocess.STDOUT, env=environment)
            self._under_way.add(process)
        status = process.wait()
        with self._lock:
            self._under_way.remove(process)
        return status

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        """Begin no other training, and have those under way save and end."""
        with self._lock:
            self.stopped_by = reason
            for process in self._under_way:
                process.terminate()


def command(study: MethodsStudy, run: Run) -> list[str]:
    """The command line of one run."""
    alone = [sys.executable, "-m", "neuclip_scale"]
    program = [*shlex.split(study.launcher), "neuclip"] if study.launcher else alone
    return [*program, "train", study.recipe, *_all_overrides(study, run)]


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; raises ValueError for one that is cut off."""
    path = folder / "summary.json"
    summary = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(summary, dict):
        raise ValueError(f"a JSON {type(summary).__name__}, not an object")
    return summary if summary.get("status") == "finished" else None


def _all_overrides(study: MethodsStudy, run: Run) -> list[str]:
    """`section.field=value` of one run, what it says for itself last."""
    own = [f"{name}={json.dumps(value)}" for name, value in run.overrides.items()]
    data = [f"data.train={json.dumps(study.data)}"] if study.data else []
    return [*study.overrides, *data, *own, *run.arm.changes]


def unusable(study: MethodsStudy, run: Run) -> str:
    """Why what stands in the run's folder can neither be kept nor gone on with, and the remedy; empty if it can."""
    try:
        begun = finished(run.folder) is not None or newest_checkpoint(run.folder) > 0
    except ValueError as error:
        return f"{run.folder / 'summary.json'} is not whole ({error}); remove it, and the run goes on"
    config = run.folder / "config.yaml"
    if not config.exists():
        return f"{config} is missing, so what was trained is unknown; remove {run.folder}" if begun else ""
    try:
        trained, _ = read_recipe(config)
    except (OSError, ValueError) as error:
        return f"{config} cannot be read ({error}); remove {run.folder}"
    asked = plain(recipe_fields(load_recipe(study.recipe, _all_overrides(study, run))))
    others = [name for name, value in asked.items() if name not in PLACES and trained.fields.get(name) != value]
    different = ", ".join(sorted(others))
    return f"{run.folder} was trained with another {different}; remove it, or give another --output" if others else ""
