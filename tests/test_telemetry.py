"""The record of a run: what is written, what a resume cuts off, and what people see."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuclip_scale.files import atomic_file, write_json
from neuclip_scale.run_folder import last_metrics
from neuclip_scale.telemetry import (
    RunLogger,
    ThroughputMeter,
    environment,
    peak_memory_bytes,
)
from neuclip_scale.telemetry.console import duration
from neuclip_scale.telemetry.environment import git_revision


def run(folder: Path, steps: range, resume_step: int = 0, **metrics: Any) -> str:
    """Log `steps` of a 10-step run with 64 samples a step, 0.5 s each; returns what the console showed."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False)
    with RunLogger(folder, 0, 10, 64, 4, resume_step, world_size=2, console=console) as logger:
        for step in steps:
            values = {"loss": 1 / step, "lr": 1e-3, "logit_scale": 20.0, "step_time": 0.5, "data_time": 0.05}
            logger.log_step(step, {**values, **metrics})
    return screen.getvalue()


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_every_step_has_a_line(tmp_path: Path) -> None:
    run(tmp_path, range(1, 11), batch_digest="ab12")
    records = read(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 11))
    last = records[-1]
    assert last["samples_seen"] == 640
    assert last["samples_per_second"] == pytest.approx(128)
    assert last["samples_per_second_per_gpu"] == pytest.approx(64)
    assert last["batch_digest"] == "ab12"
    assert last["peak_memory_bytes"] > 2**20


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Sets the size in bytes at which this process's files are as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_file_and_leaves_whole_lines(
    tmp_path: Path, limit_files: Callable[[int], None]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    run(tmp_path, range(1, 3), note="x" * 2000)
    limit_files(metrics.stat().st_size + 2000)  # the other files are smaller
    with pytest.raises(OSError, match="too large") as caught:
        run(tmp_path, range(3, 4), resume_step=2, note="x" * 2000)
    assert caught.value.filename == str(metrics)
    assert [record["step"] for record in last_metrics(tmp_path, 9)] == [1, 2]
    limit_files(resource.RLIM_INFINITY)
    run(tmp_path, range(3, 5), resume_step=2)
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_is_told_with_the_file_of_scores_and_curves(
    tmp_path: Path, limit_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's own thread fails, too
    scores, curves = tmp_path / "evaluations.jsonl", tmp_path / "tensorboard"
    logger = RunLogger(tmp_path, 0, 10, 64, 4, console=Console(file=io.StringIO()))
    logger.log_evaluation(1, {"birds": "x" * 9000})  # more than the other files have
    limit_files(scores.stat().st_size + 10)
    with pytest.raises(OSError, match="too large") as caught:
        logger.log_evaluation(2, {"birds": "x"})
    assert caught.value.filename == str(scores)
    limit_files(next(curves.iterdir()).stat().st_size)
    logger._tensorboard.add_scalar("birds", 0.5, 2)
    with pytest.raises(OSError, match="too large") as caught:
        logger.close()
    assert caught.value.filename == str(curves)


def test_tensorboard_names_and_steps(tmp_path: Path) -> None:
    normalizer: dict[str, Any] = {"normalizer/error": 0.25}
    run(tmp_path, range(1, 11), **normalizer)
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [4, 8, 10]
    for name in ("lr", "logit_scale", "samples_per_second", "samples_per_second_per_gpu"):
        assert len(curve(tmp_path, f"train/{name}")) == 3
    assert curve(tmp_path, "normalizer/error")[0] == (4, 0.25)


def test_resume_cuts_off_what_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, range(1, 9))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed in the middle of a line
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names
    with caplog.at_level(logging.WARNING):
        run(tmp_path, range(6, 11), resume_step=5, grad_norm=2.0)
    records = read(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert ["grad_norm" in record for record in records] == [False] * 5 + [True] * 5
    assert "dropped 1 unreadable lines" in caplog.text
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [4, 8, 10]


def test_resume_from_the_start_begins_anew(tmp_path: Path) -> None:
    """As after a kill before the first checkpoint."""
    run(tmp_path, range(1, 9))
    time.sleep(1.1)  # see above
    run(tmp_path, range(1, 5))
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [4]


def test_non_finite_numbers_stay_readable_json(tmp_path: Path) -> None:
    run(tmp_path, range(1, 2), loss=float("nan"), grad_norm=float("inf"))
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (record["loss"], record["grad_norm"]) == ("NaN", "Infinity")
    write_json(tmp_path / "x.json", {"a": [float("-inf")], "folder": tmp_path})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": ["-Infinity"], "folder": str(tmp_path)}


def test_plain_console_lines(tmp_path: Path) -> None:
    lines = run(tmp_path, range(1, 11)).splitlines()
    assert len(lines) == 3
    for part in ("step 4/10", "loss 0.2500", "tau 0.0500", "128 samples/s", "data wait 10%", "ETA 3s"):
        assert part in lines[0]
    assert "step 10/10" in lines[2]


def test_terminal_shows_one_live_line(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with RunLogger(tmp_path, 0, 2, 8, 1, console=console) as logger:
        for step in (1, 2):
            logger.log_step(step, {"loss": 0.5, "step_time": 0.1, "data_time": 0.0})
        logger.message("saved [step_2]")
    assert "step 2/2" in screen.getvalue()
    assert "saved [step_2]" in screen.getvalue()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLogger(tmp_path / "run", 1, 10, 64, 4) as logger:
        logger.log_step(1, {"loss": 1.0, "step_time": 0.1, "data_time": 0.0})
        logger.log_scalars(1, {"evaluation/accuracy": 0.5})
        logger.message("nothing")
    assert not (tmp_path / "run").exists()


def test_environment_names_what_ran(tmp_path: Path) -> None:
    run(tmp_path, range(1, 2))
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["world_size"] == 2
    assert {"torch", "numpy", "timm"} <= written["packages"].keys()
    assert written["cpu"]
    assert environment()["num_cpus"] >= 1


def test_git_revision_tells_a_changed_checkout(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = git_revision(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path) == {**clean, "dirty": True}
    (tmp_path / ".git" / "index").write_text("damaged")
    assert git_revision(tmp_path) == {**clean, "dirty": None}


def test_throughput_is_of_the_window() -> None:
    meter = ThroughputMeter(window=2)
    assert (meter.samples_per_second, meter.step_time, meter.data_wait_share) == (0.0, 0.0, 0.0)
    for seconds in (100.0, 1.0, 3.0):
        meter.update(8, seconds, seconds / 4)
    assert meter.samples_per_second == pytest.approx(16 / 4)
    assert meter.step_time == pytest.approx(2.0)
    assert meter.data_wait_share == pytest.approx(0.25)
    meter.update(8, 1.0, 30.0)  # its batch came late, while the step before was waited for
    assert meter.data_wait_share == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m 00s"), (3720, "1h 02m"), (183_600, "2d 03h"), (-1, "0s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_failed_replacement_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"done": 1})
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"half", 1])  # type: ignore[list-item]
    assert json.loads(path.read_text()) == {"done": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_peak_memory_counts_bytes() -> None:
    script = "from neuclip_scale.telemetry.meter import peak_memory_bytes as p; b = bytearray(2**28); print(p())"
    peak = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    # Counted in KiB once too often it would be above 2**38; a child of a large process starts from that one's peak.
    assert 2**28 < peak < 2**37
    assert peak_memory_bytes() > 0
