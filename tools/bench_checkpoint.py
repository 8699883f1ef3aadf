"""Writing and reading a checkpoint beside torch.save of the same bytes: `python tools/bench.py checkpoint`."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_turns

PEER, WAITING, BACKGROUND, BOUND = "torch.save", "ours, waiting", "ours, in the background", "bound: write"
TENSOR_MIB = 4
BEST_OF = 5
"""Times that the bound is measured in each round."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state of many tensors, as of weights and Adam's moments, to a folder and back."""

    mebibytes: int = 1024
    """Size of the state; ViT-B/32 with its optimizer takes 1,731."""
    folder: str = ""
    """Where to write; a temporary folder otherwise."""
    threads: int = 1
    """Threads of every process."""
    repeats: int = 5
    """Measurements of each contender."""
    contenders: tuple[str, ...] = (PEER, WAITING, BACKGROUND, BOUND)
    """What to measure, by turns."""
    json: str = ""
    """Write every measurement to this file."""


def child(options: Checkpoint, contender: str) -> None:
    """Measure one contender in this process and print a JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    elements = TENSOR_MIB * bench_turns.MEBIBYTE // 4
    state = {f"layer {i}": torch.randn(elements) for i in range(max(1, options.mebibytes // TENSOR_MIB))}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        measure_one = {PEER: _torch_save, WAITING: _waiting, BACKGROUND: _background, BOUND: _write}[contender]
        print(json.dumps(measure_one(state, Path(name))))


def _torch_save(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """One file, on the disk as ours is."""
    import torch

    path = folder / "state.pt"

    def save() -> None:
        torch.save(state, path)
        _sync(path)

    seconds = _seconds(save)
    _forget(folder)
    return {
        "write_seconds": seconds,
        "blocked_seconds": seconds,
        "read_seconds": _seconds(lambda: torch.load(path, weights_only=True)),
    }


def _waiting(state: dict[str, Any], folder: Path) -> dict[str, float]:
    from neuclip_scale.checkpoint import load_all_ranks, save_checkpoint

    seconds = _seconds(lambda: save_checkpoint(folder, 1, {}, {"state": state}, keep=1))
    _forget(folder)
    return {
        "write_seconds": seconds,
        "blocked_seconds": seconds,
        "read_seconds": _seconds(lambda: load_all_ranks(folder / "step_000000001")),
    }


def _background(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """A copy of the state and the start, steps of other work while a thread writes, the end."""
    import torch

    from neuclip_scale.checkpoint import snapshot, start_save

    work = torch.randn(512, 512)

    def step() -> float:
        return _seconds(lambda: [work @ work for _ in range(20)])

    alone = statistics.median(step() for _ in range(20))
    began, during = time.perf_counter(), []
    pending = start_save(folder, 1, {}, {"state": snapshot(state)}, keep=1)
    blocked = time.perf_counter() - began
    while not pending.is_written:
        during.append(step())
    blocked += _seconds(pending.finish)
    whole = time.perf_counter() - began
    return {
        "write_seconds": whole,
        "blocked_seconds": blocked,
        "step_slowdown": statistics.median(during) / alone if during else 1.0,
    }


def _write(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """The bytes alone, to the disk and back, the best of several: a bound is what the disk can do, not its mean."""
    path = folder / "bytes"
    size = max(value.nbytes for value in state.values())

    def write() -> None:
        with open(path, "wb") as file:
            for value in state.values():
                file.write(value.numpy())
        _sync(path)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.read(size):
                pass

    written, back = [], []
    for _ in range(BEST_OF):
        path.unlink(missing_ok=True)
        written.append(_seconds(write))
        _forget(folder)
        back.append(_seconds(read))
    return {"write_seconds": min(written), "blocked_seconds": min(written), "read_seconds": min(back)}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _forget(folder: Path) -> None:
    """Drop the files from the page cache, so that reading them is reading the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def check(options: Checkpoint) -> None:
    """Raise SystemExit for what is no contender."""
    bench_turns.refuse_unknown("contenders", options.contenders, (PEER, WAITING, BACKGROUND, BOUND))


def measure(options: Checkpoint) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds."""
    runs = bench_turns.by_turns(__file__, options)
    figures = {
        "write_seconds": "write_ratio", "blocked_seconds": "blocked_ratio", "read_seconds": "read_ratio",
        "step_slowdown": "slowdown_ratio",
    }  # fmt: skip
    return {"rows": bench_turns.compared(runs, dict.fromkeys(options.contenders, PEER), figures), "runs": runs}


def show(options: Checkpoint, result: dict[str, Any]) -> None:
    """Print the comparison."""
    print(f"{options.mebibytes} MiB, commit {result['commit']}; written to the disk, read from it")
    columns = {
        "write_seconds": "write|.2f", "write_ratio": "of torch.save|.2f", "blocked_seconds": "blocked|.2f",
        "blocked_ratio": "of torch.save|.2f", "read_seconds": "read|.2f", "read_ratio": "of torch.load|.2f",
        "step_slowdown": "steps meanwhile|.2f",
    }  # fmt: skip
    bench_turns.print_rows(result["rows"], columns)


if __name__ == "__main__":
    child(bench_turns.options_of(Checkpoint, sys.argv[2]), sys.argv[1])
