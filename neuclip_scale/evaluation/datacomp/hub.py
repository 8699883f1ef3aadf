"""Sets from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from neuclip_scale.evaluation.datacomp.tasks import Task
from neuclip_scale.evaluation.datasets import EvaluationDataError, open_set


def fetch(task: Task, data: Path) -> Path:
    """Download the set of `task` into its folder under `data`, where it is not there yet; returns the folder.

    A fetch that was cut off goes on with the files that lack. Asks the hub that HF_ENDPOINT names. Raises
    `EvaluationDataError` when it does not come.
    """
    folder = data / task.folder
    if _is_there(task, folder):
        return folder
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            task.repository,
            repo_type="dataset",
            local_dir=folder,
            allow_patterns=task.wanted_files,
            endpoint=os.environ.get("HF_ENDPOINT") or None,
        )
    except Exception as error:  # whatever it is: its error classes have changed their names and parents
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EvaluationDataError(
            f"data set {task.repository} could not be fetched ({type(error).__name__}: {reason}). Without a way to "
            f"the hub fetch it elsewhere, put it into {folder}, and leave --hub out."
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
