"""CPU time until something happens: `python tools/bench.py startup`."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_turns

HELP, PACKAGE, TORCH, PEER = "neuclip --help", "import neuclip_scale", "import torch", "import open_clip"
FIRST_STEP, BOUND = "neuclip train, one step", "python -c pass"


@dataclass(frozen=True, kw_only=True)
class Startup:
    """CPU seconds, user and system, of whole processes."""

    repeats: int = 5
    """Measurements of each."""
    contenders: tuple[str, ...] = (HELP, PACKAGE, TORCH, PEER, FIRST_STEP, BOUND)
    """What to measure, by turns."""
    json: str = ""
    """Write every measurement to this file."""


def check(options: Startup) -> None:
    """Raise SystemExit for what is no contender."""
    bench_turns.refuse_unknown("contenders", options.contenders, (HELP, PACKAGE, TORCH, PEER, FIRST_STEP, BOUND))


def measure(options: Startup) -> dict[str, Any]:
    """All of them by turns; returns what --json holds."""
    runs: dict[str, list[float]] = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if FIRST_STEP in options.contenders:
            from neuclip_scale.data.synthetic import write_synthetic_shards

            write_synthetic_shards(folder / "shards", num_samples=64, samples_per_shard=32, image_size=40, seed=0)
        for repeat in range(options.repeats):
            for contender in options.contenders:
                runs[contender].append(_cpu_seconds(_command(contender, folder, repeat)))
    rows = [
        {"contender": each, "cpu_seconds": statistics.median(spent), "cpu_seconds_range": [min(spent), max(spent)]}
        for each, spent in runs.items()
    ]
    return {"rows": rows, "runs": runs}


def _command(contender: str, folder: Path, repeat: int) -> list[str]:
    if contender == BOUND:
        return [sys.executable, "-c", "pass"]
    if contender.startswith("import "):
        return [sys.executable, "-c", contender]
    neuclip = [sys.executable, "-m", "neuclip_scale"]
    if contender == HELP:
        return [*neuclip, "--help"]
    options = {
        "run-dir": folder / f"run{repeat}", "data.train": folder / "shards", "data.num_workers": 0,
        "data.num_streams": 4, "evaluation.data": "", "evaluation.normalizer_every_steps": 0,
        "train.global_batch_size": 32, "train.num_steps": 1, "engine.device": "cpu", "model.preset": "toy",
    }  # fmt: skip
    return [*neuclip, "train", "demo", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def _cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(options: Startup, result: dict[str, Any]) -> None:
    """Print it."""
    for row in result["rows"]:
        low, high = row["cpu_seconds_range"]
        print(f"{row['contender']:<26}{row['cpu_seconds']:>7.2f} s of CPU ({low:.2f} to {high:.2f})")
