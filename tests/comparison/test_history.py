"""Runs that went on under another recipe or other code are told, whatever their last recipe says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import ENVIRONMENT, write_run

from neuclip_scale.comparison.comparing import compare_runs
from neuclip_scale.comparison.history import mixed_runs
from neuclip_scale.comparison.run_folder import read_runs
from neuclip_scale.telemetry.starts import note_start

OTHER_COMMIT = {**ENVIRONMENT, "git": {"commit": "b" * 40, "dirty": False}, "hostname": "two", "world_size": 8}


def note(run: Path, step: int, environment: dict[str, Any] = ENVIRONMENT, **changed: tuple[Any, Any]) -> None:
    note_start(run, step, environment, {name.replace("__", "."): both for name, both in changed.items()}, (0, 0.0))


def test_another_recipe_and_other_code_are_findings(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for run in runs:
        note(run, 0)
    note(runs[1], 2, optim__learning_rate=(1e-3, 0.05), data__num_workers=(0, 4), resume=("auto", "never"))
    note(runs[2], 3, OTHER_COMMIT)
    comparison = compare_runs(read_runs(runs))
    assert [finding.text for finding in comparison.findings] == [
        "b: trained with another recipe from step 2 on: optim.learning_rate 0.001 -> 0.05.",
        "c: trained by other code from step 3 on: git commit.",
    ]
    assert comparison.document()["history"] == [finding.text for finding in comparison.findings]


def test_another_machine_and_starts_that_left_nothing_are_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    note(run, 0, OTHER_COMMIT)
    note(run, 0)  # no checkpoint was written before
    note(run, 2, {**ENVIRONMENT, "hostname": "two", "world_size": 8}, data__num_workers=(0, 4))
    assert not mixed_runs(read_runs([run]))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]\n",
        json.dumps({"step": 0, "changed": [], "environment": 3, "lost": {}}),
        json.dumps({"step": math.inf, "changed": {"seed": [0, 1]}, "environment": {}, "lost": {}}),
    ],
)
def test_a_damaged_history_is_told(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "a")
    (run / "starts.jsonl").write_text(text)
    (told,) = mixed_runs(read_runs([run]))
    assert told.startswith("a: how it was started cannot be read")
