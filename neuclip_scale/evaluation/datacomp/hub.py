"""Sets from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.evaluation.datacomp.tasks import Task
from neuclip_scale.evaluation.datasets import EvaluationDataError, open_set
from neuclip_scale.hub import HubError, fetch_dataset


def fetch(task: Task, data: Path) -> Path:
    """Download the set of `task` into its folder under `data`, where it is not there yet; returns the folder.

    A fetch that was cut off goes on with the files that lack. Asks the hub that HF_ENDPOINT names. Raises
    `EvaluationDataError` when it does not come.
    """
    folder = data / task.folder
    if _is_there(task, folder):
        return folder
    try:
        fetch_dataset(task.repository, folder, task.wanted_files)
    except HubError as error:
        raise EvaluationDataError(
            f"data set {error}. Without a way to the hub fetch it elsewhere, put it into {folder}, and leave --hub out."
        ) from error
    return folder


def _is_there(task: Task, folder: Path) -> bool:
    """Whether every file is there; each has got its name when it was whole."""
    if task.kind != "classification":
        return all(any(folder.glob(pattern)) for pattern in task.wanted_files)
    try:
        open_set(folder)
    except (EvaluationDataError, OSError):
        return False
    return True
