"""Tiny runs by the scripts in slurm/, on the virtual cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cluster import Cluster
from trainer_helpers import settings

SCRIPTS = Path(__file__).parents[2] / "slurm"
STEPS = 30

OPTIONS: dict[str, Any] = {
    "model.preset": "toy",
    "model.dropout": 0.1,
    "data.num_workers": 1,
    "train.num_steps": STEPS,
    "train.micro_batch_size": 2,
    "train.log_every_steps": 1,
    "checkpoint.every_steps": 8,
}


def demo_scale(data: Path, run_dir: Path, **overrides: Any) -> list[str]:
    """Arguments that make a recipe as small as these tests want it."""
    pairs = settings(data, run_dir, **OPTIONS | overrides).items()
    return [part for name, value in pairs for part in (f"--{name}", str(value))]


def program(folder: Path, before: str = "") -> str:
    """The `neuclip` that jobs run; `before` is shell code that comes first."""
    path = folder / "neuclip"
    root = Path(__file__).parents[2]
    setting = f'export PYTHONPATH="{root}"\nexport OMP_NUM_THREADS=1\n'
    path.write_text(f'#!/bin/bash\n{setting}{before}\nexec {sys.executable} -m neuclip_scale "$@"\n')
    path.chmod(0o755)
    return str(path)


def environment(folder: Path, before: str = "", **variables: str) -> dict[str, str]:
    """What the scripts read of it here: one task a node, for there are fewer cores than GPUs."""
    given = {
        "NEUCLIP": program(folder, before),
        "NEUCLIP_SITE": str(folder / "site.env"),
        "NEUCLIP_TASKS_PER_NODE": "1",
    }
    return given | {"NEUCLIP_RANK_WAIT": "5", "NEUCLIP_PREFLIGHT": "0"} | variables


def sbatch(
    cluster: Cluster, script: str, folder: Path, *arguments: str, nodes: int = 2, before: str = "", **variables: str
) -> str:
    """Submit a script; returns the job's id. Its output lies in `folder`."""
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={folder}/%x-%j.log", SCRIPTS / script]
    return cluster.run(*command, *arguments, **environment(folder, before, **variables)).strip()


def output(folder: Path, job: str) -> str:
    """What a job has printed."""
    return "".join(path.read_text(errors="replace") for path in folder.glob(f"*-{job}.log"))


def steps_logged(run_dir: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
