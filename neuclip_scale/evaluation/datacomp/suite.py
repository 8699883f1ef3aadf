"""All tasks in turn, each taken over from an earlier run where nothing it depends on has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuclip_scale import distributed
from neuclip_scale.evaluation.datacomp.answering import evaluate_task
from neuclip_scale.evaluation.datacomp.averages import average_scores
from neuclip_scale.evaluation.datacomp.fingerprints import data_digest, model_digest
from neuclip_scale.evaluation.datacomp.hub import fetch
from neuclip_scale.evaluation.datacomp.results import Result, read_result, write_result, write_results_file
from neuclip_scale.evaluation.datacomp.tasks import Task, all_tasks
from neuclip_scale.evaluation.datasets import EvaluationDataError
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.files import write_json

_REASONS_KEPT = 100


@dataclass(frozen=True)
class SuiteRequest:
    """What to evaluate, and where its results go."""

    data: Path
    output: Path
    tasks: Sequence[Task]
    """Others keep the results they have in `output`."""
    hub: bool = False
    """Fetch the sets that are not under `data`."""
    any_size: bool = False
    """Average also over sets that have not DataComp's number of samples."""


@dataclass
class Progress:
    """What is known so far, by key."""

    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_suite(encoders: Encoders, request: SuiteRequest, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Evaluate the tasks of `request` (collective, unless the share is all); returns what summary.json holds.

    Every task's result is on the disk before the next one begins. A set that cannot be used is listed as failed, and
    the others go on. `report` gets a line a task, on rank 0.
    """
    tell = report if distributed.is_main() else (lambda line: None)
    model = distributed.on_main(lambda: model_digest(encoders))
    progress = Progress()
    for task in all_tasks():
        asked = task in request.tasks
        try:
            folder = distributed.on_main(lambda task=task, asked=asked: _find(task, request, asked))  # type: ignore[misc]
            if folder is None:
                continue
            result = _run_task(task, folder, encoders, request.output, model, evaluate=asked)
        except (EvaluationDataError, OSError) as error:
            progress.failed[task.key] = str(error)
            tell(f"{task.name}: failed. {error}")
            continue
        if result is not None:
            progress.results[task.key] = result
            score = result.main_metric(task)
            tell(f"{task.name}: {task.metric} {'none' if score is None else f'{score:.4f}'}")
            distributed.on_main(lambda: _write(request, progress))
    return distributed.on_main(lambda: _write(request, progress))


def _find(task: Task, request: SuiteRequest, asked: bool) -> Path | None:
    """The folder of a task, fetched where that is asked for; runs on rank 0."""
    found = task.locate(request.data)
    # Its own folder may be a fetch that was cut off.
    if asked and request.hub and found in (None, request.data / task.folder):
        return fetch(task, request.data)
    return found


def _run_task(
    task: Task, folder: Path, encoders: Encoders, output: Path, model: str, *, evaluate: bool
) -> Result | None:
    data = distributed.on_main(lambda: data_digest(task, folder))
    known = distributed.on_main(lambda: read_result(output, task, model, data))
    if known is not None or not evaluate:
        return known
    began = time.perf_counter()
    outcome = evaluate_task(task, folder, encoders)
    result = Result(
        key=task.key,
        metrics=outcome.metrics,
        num_samples=outcome.num_samples,
        num_unreadable=len(outcome.unreadable),
        unreadable=outcome.unreadable[:_REASONS_KEPT],
        seconds=time.perf_counter() - began,
        model=model,
        data=data,
    )
    distributed.on_main(lambda: write_result(output, task, result))
    return result


def _write(request: SuiteRequest, progress: Progress) -> dict[str, Any]:
    done = [(task, progress.results[task.key]) for task in all_tasks() if task.key in progress.results]
    write_results_file(request.output, done)
    summary = summarise(request, progress)
    write_json(request.output / "summary.json", summary)
    return summary


def summarise(request: SuiteRequest, progress: Progress) -> dict[str, Any]:
    """Averages over the tasks that count, and every task that does not, with the reason."""
    scores, incomplete, rows = {}, [], []
    for task in all_tasks():
        result = progress.results.get(task.key)
        if result is None:
            continue
        score, fault = result.main_metric(task), result.fault(task, request.any_size)
        rows.append(
            {
                "key": task.key,
                "dataset": task.name,
                "metric": task.metric,
                "value": score,
                "num_samples": result.num_samples,
                "num_unreadable": result.num_unreadable,
            }
        )
        if fault:
            incomplete.append({"key": task.key, "reason": fault, "unreadable": result.unreadable[:3]})
        elif score is not None:
            scores[task.key] = score
    absent = [task for task in request.tasks if task.key not in {*progress.results, *progress.failed}]
    return {
        "suite": "datacomp",
        "data": str(request.data),
        "averages": average_scores(scores),
        "tasks": rows,
        "missing": [
            {"key": task.key, "folder": str(request.data / task.folder), "hub": task.repository} for task in absent
        ],
        "failed": [{"key": key, "error": error} for key, error in progress.failed.items()],
        "incomplete": incomplete,
        "num_asked": len(request.tasks),
    }
