"""SIGTERM and SIGUSR1 to real processes: save, say what to do, exit with 75, and go on to the same numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from trainer_helpers import (
    arguments,
    assert_same,
    logged_steps,
    neuclip,
    neuclip_ranks,
    start,
    wait_for_steps,
)

OPTIONS: dict[str, Any] = {
    "model.dropout": 0.1,
    "data.num_workers": 1,
    "train.num_steps": 10,
    "train.log_every_steps": 1,
}


def stopped_at(text: str, name: str, remedy: str) -> int:
    """The step at which the run says it stopped."""
    found = re.search(rf"^stopped by {name} at step (\d+); saved\. {remedy} to go on\.$", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1])


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    status, text = neuclip(arguments(shards, folder / "run", **OPTIONS), folder / "output.txt")
    assert status == 0, text
    yield folder / "run"
    shutil.rmtree(folder)


def stop(argv: list[str], run_dir: Path, number: signal.Signals) -> str:
    """Start `neuclip` with `argv`, send it a signal after two steps; returns what it printed."""
    started = start(argv, run_dir.with_suffix(".txt"))
    wait_for_steps(run_dir, 2, started.is_alive)
    os.kill(started.pid, number)
    assert started.wait() == 75, started.text()
    return started.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_start_goes_on(
    shards: Path, runs: Path, whole: Path, number: signal.Signals
) -> None:
    run_dir, argv = runs / "run", arguments(shards, runs / "run", **OPTIONS)
    step = stopped_at(stop(argv, run_dir, number), number.name, "Run again")
    assert 2 <= step < 10
    assert json.loads((run_dir / "summary.json").read_text("utf-8"))["status"] == "stopped"
    assert [line["step"] for line in logged_steps(run_dir)] == list(range(1, step + 1))
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{step:09d}"]

    assert neuclip(argv, runs / "resumed.txt")[0] == 0
    assert_same(logged_steps(run_dir), logged_steps(whole))
    assert json.loads((run_dir / "summary.json").read_text("utf-8"))["status"] == "finished"


def test_a_stopped_run_that_began_from_a_path_says_how_to_go_on(shards: Path, runs: Path, whole: Path) -> None:
    """Started again as it was, it would begin at that checkpoint once more."""
    options = OPTIONS | {"train.num_steps": 20, "resume": str(whole / "checkpoints" / "step_000000010")}
    text = stop(arguments(shards, runs / "run", **options), runs / "run", signal.SIGTERM)
    assert stopped_at(text, "SIGTERM", "Run again with --resume auto") >= 12


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_the_same_step(shards: Path, runs: Path) -> None:
    run_dir = runs / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [sys.executable, "-m", "neuclip_scale", *arguments(shards, run_dir, **OPTIONS)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    ) as torchrun:
        wait_for_steps(run_dir, 2, lambda: torchrun.poll() is None)
        ranks = psutil.Process(torchrun.pid).children()
        (second,) = (process for process in ranks if process.environ().get("RANK") == "1")
        second.send_signal(signal.SIGUSR1)
        text, _ = torchrun.communicate(timeout=120)
    step = stopped_at(text, "another rank", "Run again")
    assert 2 <= step < 10
    # torchrun's own status is 1; those of its ranks stand in its report.
    assert re.search(r"exitcode\s*:\s*75\b", text), text
    assert (run_dir / "checkpoints" / f"step_{step:09d}" / "rank_00001.pt").is_file()

    assert neuclip_ranks(2, arguments(shards, run_dir, **OPTIONS), runs / "resumed.txt") == [0, 0]
    assert neuclip_ranks(2, arguments(shards, runs / "whole", **OPTIONS), runs / "whole.txt") == [0, 0]
    assert_same(logged_steps(run_dir), logged_steps(runs / "whole"))


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(shards: Path, tmp_path: Path) -> None:
    given = arguments(shards, tmp_path / "run", **OPTIONS | {"train.num_steps": 100_000})
    with start(given, tmp_path / "first.txt") as first:
        wait_for_steps(tmp_path / "run", 3, first.is_alive)
        other = arguments(shards, tmp_path / "run", **OPTIONS | {"objective.name": "openclip"})
        status, text = neuclip(other, tmp_path / "second.txt")
        assert status == 2, text
        assert f"process {first.pid} on" in text
        assert "Wait for its end, stop it, or give another run_dir." in text
        assert first.is_alive()
        assert "openclip" not in (tmp_path / "run" / "config.yaml").read_text()
    status, text = neuclip(arguments(shards, tmp_path / "run", **OPTIONS | {"train.num_steps": 4}), tmp_path / "3.txt")
    assert status == 0, text  # nobody is left who trains there
