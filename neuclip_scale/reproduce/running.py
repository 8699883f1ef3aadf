"""Does stages in turn, keeps what is finished, and says why something cannot be kept."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from neuclip_scale.files import json_ready, write_json
from neuclip_scale.reproduce.errors import ReproduceError, TrainingsFailedError
from neuclip_scale.reproduce.places import Places
from neuclip_scale.reproduce.stages import Stage
from neuclip_scale.reshard.workers import available_cores
from neuclip_scale.run_folder import read_object

Report = Callable[[str], None]


class Runner:
    """The stages of one reproduction."""

    def __init__(self, stages: Iterable[Stage], places: Places, report: Report) -> None:
        """`stages` in an order in which each comes after those it uses."""
        self.stages = {stage.name: stage for stage in stages}
        self._places, self._report = places, report
        self._keys: dict[str, str] = {}
        for stage in self.stages.values():
            self._keys[stage.name] = stage.key([self._keys[name] for name in stage.after])

    def record(self, stage: Stage) -> dict[str, Any]:
        """What the finished stage left; empty where it is not finished. Raises `ReproduceError` where it was done with
        other settings, or on what has been done anew since.
        """
        path = self._places.record(stage.name)
        found = read_object(path)
        if not found or stage.kind == "report":
            return {}
        remedy = f"remove {path}" + "".join(f" and {each}" for each in stage.produces)
        if found["key"] != self._keys[stage.name]:
            raise ReproduceError(
                f"{path}: {stage.name} was done with other settings ({_difference(stage, found)}). Give another "
                f"--output, or {remedy}."
            )
        missing = [str(each) for each in stage.produces if not each.exists()]
        if missing:
            self._report(f"{stage.name}: {missing[0]} is no longer there: once more")
            return {}
        newer = [name for name, began in found.get("used", {}).items() if self._began(name) not in (None, began)]
        if newer and stage.kind != "evaluate":
            raise ReproduceError(f"{path}: {newer[0]} has been done anew since {stage.name} was. To follow, {remedy}.")
        return {} if newer else found

    def _began(self, name: str) -> float | None:
        """When the stage that is done now was begun; None where it is not."""
        return read_object(self._places.record(name)).get("began")

    def run(self, names: Sequence[str], jobs: int) -> None:
        """Do what is not done of `names`; trainings side by side, `jobs` at a time.

        A training or an evaluation that fails stops no other, nor the report; `TrainingsFailedError` is raised at the
        end with all that failed, and `ReproduceError` at once where another stage does.
        """
        failed: list[str] = []
        for kind, group in groupby([self.stages[name] for name in names], key=lambda stage: stage.kind):
            if kind == "train":
                with ThreadPoolExecutor(jobs) as pool:
                    failed += filter(None, pool.map(lambda stage: self._try(stage, jobs), group))
            elif kind == "evaluate":
                # What was not trained has been told.
                possible = [stage for stage in group if not failed or self._is_trained(stage)]
                failed += filter(None, [self._try(stage, 1) for stage in possible])
            else:
                for stage in group:
                    self._one(stage, 1)
        if failed:
            raise TrainingsFailedError("; ".join(failed))

    def _is_trained(self, evaluation: Stage) -> bool:
        try:
            return self.is_done(self.stages[evaluation.after[0]])
        except ReproduceError:  # which the training has told
            return False

    def _try(self, stage: Stage, at_a_time: int) -> str:
        """What went wrong with a stage beside which others run to their end."""
        try:
            self._one(stage, at_a_time)
        except ReproduceError as error:
            return str(error)
        return ""

    def is_done(self, stage: Stage, *, keep: bool = True) -> bool:
        """Whether there is nothing to do; with `keep` takes over what was done elsewhere. Raises `ReproduceError`."""
        if self.record(stage):
            return True
        if stage.was_done is None or not stage.was_done():
            return False
        if keep:
            self._keep(stage, None)
        return True

    def _one(self, stage: Stage, at_a_time: int) -> None:
        """Do one stage unless it is done; raises `ReproduceError`."""
        if self.is_done(stage):
            self._report(f"{stage.name}: kept from before")
            return
        for name in stage.after:
            if stage.kind != "report" and not self.is_done(self.stages[name]):
                raise ReproduceError(f"{stage.name}: {name} is not done yet. Do it first.")
        began, log = time.time(), self._places.log(stage.name)
        try:
            with self._alone(stage):
                self._report(f"{stage.name}: begins")
                if stage.do:
                    stage.do(log)
                for command in stage.commands:
                    command.run(log, _environment(at_a_time) if stage.kind == "train" else None)
                result = self._keep(stage, began)
        except ReproduceError as error:
            raise ReproduceError(f"{stage.name}: {error}") from error
        told = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in result.items())
        self._report(f"{stage.name}: done in {time.time() - began:.0f} s{f' ({told})' if told else ''}")

    @contextmanager
    def _alone(self, stage: Stage) -> Iterator[None]:
        """No other process does this stage meanwhile."""
        path = self._places.record(stage.name).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                told = (
                    f"{path}: another process is doing this. Wait for it, or end it, and give the same command again."
                )
                raise ReproduceError(told) from error
            yield

    def _keep(self, stage: Stage, began: float | None) -> dict[str, Any]:
        """Write the stage's record; returns its result. `began` is None for what was done elsewhere."""
        result, path, now = stage.read(), self._places.record(stage.name), time.time()
        record = {
            "stage": stage.name, "key": self._keys[stage.name], "settings": stage.settings, "began": began or now,
            "seconds": None if began is None else now - began, "result": result,
            "used": {name: self._began(name) for name in stage.after if stage.kind != "report"},
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return result


def _environment(at_a_time: int) -> dict[str, str]:
    """This Python's programs come first; cores are shared by runs side by side."""
    found = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if at_a_time > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // at_a_time)))
    return found


def _difference(stage: Stage, found: dict[str, Any]) -> str:
    now, then = json_ready(stage.settings), found.get("settings", {})
    names = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    if not names:
        return "of a stage before it"
    return "; ".join(f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
