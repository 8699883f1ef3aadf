"""SIGTERM and SIGUSR1 to real processes: save, say what to do, exit with 75, and go on to the same numbers."""

from __future__ import annotations

import os
import re
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
    "train.num_steps": 12,
    "train.log_every_steps": 1,
}


def stopped_at(text: str, name: str) -> int:
    """The step at which the run says it stopped."""
    found = re.search(rf"^stopped by {name} at step (\d+); saved\. Run again to go on\.$", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_start_goes_on(shards: Path, runs: Path, number: signal.Signals) -> None:
    assert neuclip(arguments(shards, runs / "whole", **OPTIONS), runs / "whole.txt")[0] == 0
    run_dir, argv = runs / "parts", arguments(shards, runs / "parts", **OPTIONS)
    started = start(argv, runs / "stopped.txt")
    wait_for_steps(run_dir, 2, started.is_alive)
    os.kill(started.pid, number)
    assert started.wait() == 75, started.text()
    step = stopped_at(started.text(), number.name)
    assert 2 <= step < 12
    assert [line["step"] for line in logged_steps(run_dir)] == list(range(1, step + 1))
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{step:09d}"]

    assert neuclip(argv, runs / "resumed.txt")[0] == 0
    assert_same(logged_steps(run_dir), logged_steps(runs / "whole"))


def test_what_to_do_after_a_start_from_a_path(shards: Path, runs: Path) -> None:
    """Run again as it was, it would begin at that checkpoint once more."""
    argv = arguments(shards, runs / "first", **OPTIONS, **{"train.num_steps": 1})
    assert neuclip(argv, runs / "first.txt")[0] == 0
    checkpoint = runs / "first" / "checkpoints" / "step_000000001"
    started = start(arguments(shards, runs / "second", **OPTIONS, resume=str(checkpoint)), runs / "second.txt")
    wait_for_steps(runs / "second", 1, started.is_alive)
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait() == 75, started.text()
    assert "; saved. Run again with --resume auto to go on.\n" in started.text()


@pytest.fixture
def torchrun(shards: Path, runs: Path) -> Iterator[subprocess.Popen[str]]:
    """A run on two ranks, as people start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [sys.executable, "-m", "neuclip_scale", *arguments(shards, runs / "parts", **OPTIONS)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        yield process
        process.kill()


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    shards: Path, runs: Path, torchrun: subprocess.Popen[str]
) -> None:
    assert neuclip_ranks(2, arguments(shards, runs / "whole", **OPTIONS), runs / "whole.txt") == [0, 0]
    run_dir = runs / "parts"
    wait_for_steps(run_dir, 2, lambda: torchrun.poll() is None)
    (second,) = (process for process in psutil.Process(torchrun.pid).children() if process.environ().get("RANK") == "1")
    second.send_signal(signal.SIGUSR1)
    text, _ = torchrun.communicate(timeout=120)
    step = stopped_at(text, "another rank")
    assert 2 <= step < 12
    # torchrun's own status is 1; that of its ranks stands in its report.
    assert re.search(r"exitcode\s*:\s*75\b", text), text
    assert (run_dir / "checkpoints" / f"step_{step:09d}" / "rank_00001.pt").is_file()

    assert neuclip_ranks(2, arguments(shards, run_dir, **OPTIONS), runs / "resumed.txt") == [0, 0]
    assert_same(logged_steps(run_dir), logged_steps(runs / "whole"))
