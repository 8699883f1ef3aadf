"""The benchmarks run and tell of every contender; how fast is not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_make_bench_runs_every_section_in_small() -> None:
    made = subprocess.run(["make", "-n", "bench"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "tools/bench.py small" in made.stdout
    done = bench("small")
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("\n== ")[1:])
    by_section = {title.split()[0]: text for title, text in told.items()}
    assert list(by_section) == ["loss", "loader", "npn", "reshard", "audit", "subset"]
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
        "subset": ["no_filter", "clip_score --arch l14 --fraction 0.3", "basic_filter"],
    }.items():
        lines = by_section[section].splitlines()
        assert [name for name in contenders if not any(line.startswith(name) for line in lines)] == []


def test_what_is_no_section_is_bad_usage() -> None:
    done = bench("losses")
    assert done.returncode == 2
    assert "bench.py small" in done.stdout
