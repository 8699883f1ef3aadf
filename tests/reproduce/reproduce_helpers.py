"""A folder like that of `neuclip demo-data`, of drawn pictures, and the smallest reproduction on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from evaluation_helpers import held_out

from neuclip_scale.data.synthetic import write_synthetic_shards

NUM_PAIRS = 160
STAGES = ("list", "download", "audit", "subset", "reshard", "index")
RUNS = ("openclip-seed0", "neuclip-seed0")


def make_demo_data(folder: Path) -> Path:
    """`NUM_PAIRS` pairs to train on and a retrieval set."""
    write_synthetic_shards(folder / "train", NUM_PAIRS, samples_per_shard=50, image_size=40, seed=1)
    held_out(folder)
    return folder


def arguments(demo_data: Path, output: Path, *more: object, steps: int = 3) -> list[str]:
    """Of `neuclip reproduce`: the packaged small demo, and smaller still."""
    chosen = ["demo-small", "--seeds", 0, "--demo-data", demo_data, "--output", output, "-j", 1]
    changes = {"train.num_steps": steps, "train.global_batch_size": 16, "objective.npn.num_prototypes": 16}
    settings = [f"--set={name}={value}" for name, value in changes.items()]
    return [str(each) for each in (*chosen, *settings, *more)]


def start(*given: str, **options: Any) -> subprocess.Popen[str]:
    """`neuclip reproduce` as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "neuclip_scale", "reproduce", *given]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def report(output: Path) -> dict[str, Any]:
    """What the report's JSON holds."""
    found: dict[str, Any] = json.loads((output / "report/report.json").read_bytes())
    return found
