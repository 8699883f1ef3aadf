"""Tiny runs: in this process, and as processes of `neuclip` that can be signalled and killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from forking import FORKSERVER, preload_training
from ports import free_ports

from neuclip_scale.config import Recipe, load_recipe

preload_training()

MEASURED = ("data_time", "step_time", "samples_per_second", "samples_per_second_per_gpu", "peak_memory_bytes")
"""What metrics.jsonl holds of the machine, not of the run."""


def is_measured(key: str) -> bool:
    """Whether the machine decides on this entry of metrics.jsonl."""
    return key in MEASURED or key.startswith("time/")


def settings(data: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Dotted fields of a run of 6 steps of 8 pairs, a little over one epoch of the `shards` fixture."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model.preset": "toy",
        "data.train": str(data),
        "data.num_workers": 0,
        "data.num_streams": 4,
        "data.shuffle_window": 8,
        "evaluation.data": "",
        "evaluation.normalizer_every_steps": 0,
        # No multiple of the batch: prototypes that are whole copies of it leave AdaGrad only rounding to scale up.
        "objective.npn.num_prototypes": 36,
        "objective.npn.restart_every": 3,
        "optim.learning_rate": 3e-4,
        "optim.temperature_learning_rate": 3e-4,
        "optim.warmup_steps": 2,
        "train.global_batch_size": 8,
        "train.num_steps": 6,
        "checkpoint.every_steps": 0,
        "engine.device": "cpu",
    }
    return values | overrides


def recipe(data: Path, run_dir: Path, **overrides: Any) -> Recipe:
    """`settings` as a recipe."""
    return load_recipe("demo", settings(data, run_dir, **overrides))


def arguments(data: Path, run_dir: Path, **overrides: Any) -> list[str]:
    """`settings` as `neuclip`'s arguments."""
    pairs = settings(data, run_dir, **overrides).items()
    return ["train", "demo", *(part for name, value in pairs for part in (f"--{name}", str(value)))]


def logged_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what differs from one machine to the next."""
    lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if not is_measured(key)} for line in lines]


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Two trees of containers, numbers and tensors are equal, bit for bit."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), f"{where} differs by {(left - right).abs().max()}"
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for position, (a, b) in enumerate(zip(left, right)):
            assert_same(a, b, f"{where}/{position}")
    else:
        assert left == right, where


class Started:
    """A process of `neuclip ARGUMENTS`, on its own or as one rank of several."""

    def __init__(
        self, function: Callable[..., Any], given: tuple[Any, ...], output: Path, environ: dict[str, str]
    ) -> None:
        self.output = output
        self._process: BaseProcess = FORKSERVER.Process(target=_enter, args=(function, given, str(output), environ))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float = 120) -> int:
        """Exit status; minus the signal's number if one ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"no end after {seconds} s: {self.text()}")
        return self._process.exitcode

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        self._process.join()

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text("utf-8", errors="replace")


def start(argv: list[str], output: Path) -> Started:
    """Start `neuclip` with `argv`; `output` receives what it prints."""
    return Started(_neuclip, (argv,), output, {})


def start_ranks(world_size: int, function: Callable[..., Any], given: tuple[Any, ...], output: Path) -> list[Started]:
    """Start `function(*given)` as the ranks of one gloo group, as torchrun would."""
    (port,) = free_ports(1)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    return [
        Started(function, given, output.with_suffix(f".{rank}"), {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def neuclip(argv: list[str], output: Path) -> tuple[int, str]:
    """Run `neuclip` with `argv` to its end: exit status and all it printed."""
    started = start(argv, output)
    return started.wait(), started.text()


def neuclip_ranks(world_size: int, argv: list[str], output: Path) -> list[int]:
    """Run `neuclip` with `argv` on several ranks to its end: their exit statuses."""
    return [rank.wait() for rank in start_ranks(world_size, _neuclip, (argv,), output)]


def wait_for_steps(
    run_dir: Path, count: int, is_alive: Callable[[], bool], *, since: float = 0.0, seconds: float = 120
) -> None:
    """Return as soon as metrics.jsonl, written to after time `since`, has `count` lines."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and metrics.stat().st_mtime > since and metrics.read_bytes().count(b"\n") >= count):
        assert is_alive(), "ended before it could be signalled"
        assert time.monotonic() < deadline, f"fewer than {count} steps in {seconds} s"
        time.sleep(0.002)


def _neuclip(argv: list[str]) -> int:
    from neuclip_scale import cli

    return cli.main(argv)


def _enter(function: Callable[..., Any], given: tuple[Any, ...], output: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    # As in a process that a shell starts: the server ignores SIGINT, and passes its way of starting processes on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(function(*given))
