"""Training goes on while a checkpoint is written, and neither notices the other."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import recipe

from neuclip_scale.checkpoint import CheckpointError, latest_checkpoint, load_all_ranks, writing
from neuclip_scale.data.batch import Batch
from neuclip_scale.trainer import Trainer

OPTIONS = {"model.preset": "toy", "checkpoint.every_steps": 2, "checkpoint.keep": 9, "objective.name": "fastclip-v3"}


class WatchedTrainer(Trainer):
    """Says when step 4 is done."""

    after_step_4 = threading.Event()

    def train_step(self, batch: Batch, *rest: Any) -> Any:
        result = super().train_step(batch, *rest)
        if self.run_state.launched + 1 == 4:
            self.after_step_4.set()
        return result


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_two_steps_pass_while_it_is_written_and_leave_it_alone(
    shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(recipe(shards, runs / "waiting", **OPTIONS, **{"checkpoint.background": False})).fit()
    write, met = writing._write, []

    def slow_write(path: Path, content: Any) -> Any:
        if "step_000000002" in str(path):
            met.append(WatchedTrainer.after_step_4.wait(timeout=60))
        return write(path, content)

    monkeypatch.setattr(writing, "_write", slow_write)
    WatchedTrainer(recipe(shards, runs / "background", **OPTIONS)).fit()
    assert met
    assert all(met), "step 4 came while the checkpoint of step 2 was not yet written"
    for step in (2, 4, 6):
        (shared, ranks), (expected, expected_ranks) = (
            load_all_ranks(runs / name / "checkpoints" / f"step_{step:09d}") for name in ("background", "waiting")
        )
        assert same(ranks, expected_ranks)
        for key in ("objective", "stream_positions", "step", "num_read", "buffers"):
            assert same(shared[key], expected[key]), key


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writing._write

    def failing_write(path: Path, content: Any) -> Any:
        if "step_000000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(writing, "_write", failing_write)
    trainer = Trainer(recipe(shards, runs / "run", **OPTIONS))
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left.*Free space; earlier checkpoints are intact"):
        trainer.fit()
    newest = latest_checkpoint(runs / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step_000000002"
    assert not list((runs / "run" / "checkpoints").glob(".tmp-*"))
