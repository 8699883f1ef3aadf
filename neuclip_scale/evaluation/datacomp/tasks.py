"""The 38 tasks, what counts in each, and where its data are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["classification", "retrieval", "winogavil"]
Group = Literal["imagenet", "shifts", "vtab", "retrieval", "other"]
Score = Literal["acc", "acc_top5"]


class SuiteError(ValueError):
    """A suite that cannot be run as asked; the message names what is wrong and the remedy."""


@dataclass(frozen=True, kw_only=True)
class WorstGroup:
    """The least score over the groups of one column of the samples' metadata."""

    name: str
    """What DataComp's result file calls it."""
    score: Score
    column: str
    without: int | None = None
    """A group that is left out."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the table."""

    key: str
    name: str
    size: int
    """Samples of the published test set."""
    metric: str = "acc1"
    """The main metric."""
    group: Group = "other"
    """The average that it enters, besides the one over all tasks."""
    kind: Kind = "classification"
    macro: bool = False
    """Macro-averaged recall and F1 are reported too."""
    columns: tuple[str, ...] = ()
    """What the numbers in a sample's .npy are."""
    worst: tuple[WorstGroup, ...] = ()
    hub: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder, as DataComp's download script gives it."""
        return f"wds_{self.key.removeprefix('fairness/').replace('/', '-')}_test"

    @property
    def repository(self) -> str:
        """Its data set on the Hugging Face hub."""
        return self.hub or f"djghosh/{self.folder}"

    @property
    def group_columns(self) -> tuple[int, ...]:
        """Positions of the columns that some worst-group score needs."""
        return tuple(sorted({self.columns.index(worst.column) for worst in self.worst}))

    @property
    def wanted_files(self) -> list[str]:
        """Patterns of the files of its repository that are read."""
        if self.kind == "classification":
            return ["classnames.txt", "zeroshot_classification_templates.txt", "test/*"]
        return ["*.csv", "*.zip"]

    def locate(self, data: Path) -> Path | None:
        """Its folder under `data`, by any of the usual names; None if there is none."""
        short = self.folder.removeprefix("wds_").removesuffix("_test")
        last = self.key.rpartition("/")[2]
        for name in (self.folder, self.folder.removesuffix("_test"), short, self.key, last):
            if (data / name).is_dir():
                return data / name
        return None


@cache
def all_tasks() -> tuple[Task, ...]:
    """The 38 tasks in DataComp's order."""
    rows = yaml.safe_load((files(__package__) / "tasks.yaml").read_text("utf-8"))
    return tuple(_task(row) for row in rows)


def select_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that `names` ask for, by key, name or group, in the table's order; all for an empty sequence.

    Raises `SuiteError` for a name that is none of these.
    """
    if not names:
        return all_tasks()
    known = {label for task in all_tasks() for label in (task.key, task.name, task.group)}
    for name in names:
        if name not in known:
            keys = ", ".join(task.key for task in all_tasks())
            raise SuiteError(
                f"{name!r} is no task of the datacomp suite. Give keys ({keys}), names, or groups (imagenet, shifts, "
                "vtab, retrieval, other)."
            )
    return tuple(task for task in all_tasks() if {task.key, task.name, task.group} & set(names))


def _task(row: dict[str, Any]) -> Task:
    worst = tuple(WorstGroup(**entry) for entry in row.pop("worst", ()))
    return Task(**{**row, "columns": tuple(row.get("columns", ()))}, worst=worst)
