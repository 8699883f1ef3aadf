"""The benchmarks run and tell of every contender; how fast is not looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **environment}
    )


def test_make_bench_runs_every_section_in_small() -> None:
    made = subprocess.run(["make", "-n", "bench"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "tools/bench.py small" in made.stdout
    done = bench("small")
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("\n== ")[1:])
    by_section = {title.split()[0]: text for title, text in told.items()}
    assert list(by_section) == ["loss", "loader", "npn", "reshard", "audit", "kernels", "subset"]
    for section, contenders in {
        "loss": ["open_clip.ClipLoss", "openclip"],
        "loader": ["open_clip", "ours", "bound: turbo decode"],
        "npn": ["by FLOPs, one process", "measured on this CPU", "modelled on GPUs"],
        "reshard": [
            "ours, kept",
            "ours, everything, -j 2",
            "tarfile, everything",
            "webdataset, kept",
            "copy and compare",
            "header walk",
            "cp",
        ],
        "audit": ["       2,000 uids"],
        "kernels": ["InfoNCE kernels" if torch.cuda.is_available() else "kernels: needs a GPU"],
        "subset": ["no_filter", "clip_score --arch l14 --fraction 0.3", "basic_filter"],
    }.items():
        lines = by_section[section].splitlines()
        assert [name for name in contenders if not any(line.startswith(name) for line in lines)] == []


def test_what_is_no_section_is_bad_usage() -> None:
    done = bench("losses")
    assert done.returncode == 2
    assert "bench.py small" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_measured_beside_their_peers(tmp_path: Path) -> None:
    """In Triton's interpreter: what runs on a GPU, on a batch that a CPU can do."""
    path = tmp_path / "kernels.json"
    small = ("--device", "cpu", "--batch-size", "24", "--embed-dim", "32", "--repeats", "1", "--json", str(path))
    done = bench("kernels", *small, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert list(result["runs"]) == [row["contender"] for row in result["rows"]] == [
        "InfoNCE kernels", "InfoNCE triton", "InfoNCE torch", "InfoNCE open_clip.ClipLoss",
        "margin kernels", "margin triton", "margin torch",
        "SigLIP kernels", "SigLIP triton", "SigLIP torch", "SigLIP open_clip.SigLipLoss",
    ]  # fmt: skip
    assert result["rows"][0]["bound_milliseconds"] > result["rows"][-1]["bound_milliseconds"] > 0
    for name in result["runs"]:
        assert name in done.stdout
