"""Results on the disk: one file a task, and all of them in the form of DataComp's eval_results.jsonl. No torch.

OUTPUT/tasks/NAME.json      scores, number of samples, what could not be read, fingerprints
OUTPUT/eval_results.jsonl   a line a task as DataComp writes it: key, dataset, metrics with main_metric
OUTPUT/summary.json         averages, and what is missing, failed or incomplete
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from neuclip_scale.evaluation.datacomp.tasks import Task
from neuclip_scale.files import write_json, write_text


@dataclasses.dataclass(frozen=True)
class Result:
    """The finished evaluation of one task."""

    key: str
    metrics: dict[str, float | int | None]
    num_samples: int
    num_unreadable: int
    unreadable: list[str]
    """The first reasons."""
    seconds: float
    model: str
    data: str
    """Fingerprints."""

    def main_metric(self, task: Task) -> float | None:
        """The score that counts; None where the set has nothing that it could be computed from."""
        value = self.metrics.get(task.metric)
        return None if value is None or not math.isfinite(value) else float(value)

    def fault(self, task: Task, any_size: bool = False) -> str:
        """Why it is not DataComp's task in full; empty when it is. `any_size` forgives the number of samples."""
        if self.main_metric(task) is None:
            return f"the set has no sample for {task.metric}"
        if any_size or self.num_samples == task.size:
            return ""
        unreadable = f", {self.num_unreadable} unreadable" if self.num_unreadable else ""
        return f"{self.num_samples:,} samples{unreadable}, where DataComp has {task.size:,}"


def result_path(output: Path, task: Task) -> Path:
    """Where the result of `task` stands."""
    return output / "tasks" / f"{task.folder}.json"


def read_result(output: Path, task: Task, model: str, data: str) -> Result | None:
    """The result of an earlier run with the same fingerprints, or None."""
    try:
        result = Result(**json.loads(result_path(output, task).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    same = (result.key, result.model, result.data) == (task.key, model, data)
    return result if same and isinstance(result.metrics, dict) else None


def write_result(output: Path, task: Task, result: Result) -> None:
    """Write the file of one task, in one step."""
    values = dataclasses.asdict(result)
    write_json(result_path(output, task), values | {"metrics": _strict(result.metrics)})


def write_results_file(output: Path, results: Iterable[tuple[Task, Result]]) -> None:
    """Replace eval_results.jsonl by the given results."""
    lines = []
    for task, result in results:
        metrics = {**_strict(result.metrics), "main_metric": result.main_metric(task)}
        lines.append(json.dumps({"key": task.key, "dataset": task.name, "metrics": metrics}, allow_nan=False))
    write_text(output / "eval_results.jsonl", "".join(line + "\n" for line in lines))


def _strict(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()}
