"""DataComp's averages over the tasks, and what is missing from them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuclip_scale.evaluation.datacomp.tasks import Task, all_tasks

AVERAGES = {
    "ImageNet": "imagenet",
    "ImageNet dist. shifts": "shifts",
    "VTAB": "vtab",
    "Retrieval": "retrieval",
    "Average": "",
}
"""Name in DataComp's tables -> group of the tasks averaged; the last is over all 38."""


def average_scores(scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Name of each average -> `value`, and where a task has no score also what there is.

    `scores`: key of each task that counts -> its main metric. `value` is the mean over all tasks of the average, as in
    DataComp's aggregate_scores.py, or None where a task lacks: a mean over other tasks is another number.
    `mean_of_those_present` is that other number, None where no task has a score; `missing` lists the keys.
    """
    return {name: _average(_members(group), scores) for name, group in AVERAGES.items()}


def _members(group: str) -> list[Task]:
    return [task for task in all_tasks() if not group or task.group == group]


def _average(tasks: list[Task], scores: Mapping[str, float]) -> dict[str, Any]:
    present = [scores[task.key] for task in tasks if task.key in scores]
    mean = sum(present) / len(present) if present else None
    return {
        "value": mean if len(present) == len(tasks) else None,
        "mean_of_those_present": mean,
        "num_tasks": len(tasks),
        "num_present": len(present),
        "missing": [task.key for task in tasks if task.key not in scores],
    }
