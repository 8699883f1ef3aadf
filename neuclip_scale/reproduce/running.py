"""Does stages in turn, keeps what is finished, and says why something cannot be kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

from neuclip_scale.files import json_ready, write_json
from neuclip_scale.reproduce.errors import ReproduceError
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
        other settings.
        """
        path = self._places.record(stage.name)
        found = read_object(path)
        if not found or stage.kind == "report":
            return {}
        if found["key"] != self._keys[stage.name]:
            raise ReproduceError(
                f"{path}: {stage.name} was done with other settings ({_difference(stage, found)}). Give another "
                f"--output, or remove {path} and what the stage wrote ({', '.join(map(str, stage.produces))})."
            )
        missing = [str(each) for each in stage.produces if not each.exists()]
        if missing:
            self._report(f"{stage.name}: {missing[0]} is no longer there: once more")
        return {} if missing else found

    def run(self, names: Sequence[str], jobs: int) -> None:
        """Do what is not done of `names`; trainings side by side, `jobs` at a time.

        A training or an evaluation that fails stops no other, nor the report; `ReproduceError` is raised at the end
        with all that failed, and at once where another stage does.
        """
        failed: list[str] = []
        for kind, group in groupby([self.stages[name] for name in names], key=lambda stage: stage.kind):
            if kind == "train":
                with ThreadPoolExecutor(jobs) as pool:
                    failed += filter(None, pool.map(lambda stage: self._try(stage, jobs), group))
            elif kind == "evaluate":
                # What was not trained has been told.
                possible = [stage for stage in group if not failed or self.is_done(self.stages[stage.after[0]])]
                failed += filter(None, [self._try(stage, 1) for stage in possible])
            else:
                for stage in group:
                    self._one(stage, 1)
        if failed:
            raise ReproduceError("; ".join(failed))

    def _try(self, stage: Stage, at_a_time: int) -> str:
        """What went wrong with a stage beside which others run to their end."""
        try:
            self._one(stage, at_a_time)
        except ReproduceError as error:
            return str(error)
        return ""

    def is_done(self, stage: Stage) -> bool:
        """Whether there is nothing to do; takes over what someone else has done. Raises `ReproduceError`."""
        if self.record(stage):
            return True
        if stage.was_done is None or not stage.was_done():
            return False
        self._keep(stage, time.time())
        return True

    def _one(self, stage: Stage, at_a_time: int) -> None:
        """Do one stage unless it is done; raises `ReproduceError`."""
        if self.is_done(stage):
            self._report(f"{stage.name}: kept from before")
            return
        for name in stage.after:
            if stage.kind != "report" and not self.is_done(self.stages[name]):
                raise ReproduceError(f"{stage.name}: {name} is not done yet. Do it first.")
        self._report(f"{stage.name}: begins")
        began, log = time.time(), self._places.log(stage.name)
        try:
            if stage.do:
                stage.do(log)
            for command in stage.commands:
                command.run(log, _environment(at_a_time) if stage.kind == "train" else None)
            result = self._keep(stage, began)
        except ReproduceError as error:
            raise ReproduceError(f"{stage.name}: {error}") from error
        told = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in result.items())
        self._report(f"{stage.name}: done in {time.time() - began:.0f} s{f' ({told})' if told else ''}")

    def _keep(self, stage: Stage, began: float) -> dict[str, Any]:
        """Write the stage's record; returns its result."""
        result, path = stage.read(), self._places.record(stage.name)
        record = {
            "stage": stage.name, "key": self._keys[stage.name], "settings": stage.settings, "began": began,
            "seconds": time.time() - began, "result": result,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return result


def _environment(at_a_time: int) -> dict[str, str] | None:
    """Cores are shared by runs side by side."""
    if at_a_time == 1:
        return None
    threads = max(1, available_cores() // at_a_time)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _difference(stage: Stage, found: dict[str, Any]) -> str:
    now, then = json_ready(stage.settings), found.get("settings", {})
    names = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    if not names:
        return "of a stage before it"
    return "; ".join(f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
