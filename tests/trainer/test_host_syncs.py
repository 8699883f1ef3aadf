"""Launching a training step never makes the host wait for a number, the step's own numbers included."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from trainer_helpers import recipe

from neuclip_scale.launched_step import QueuedNumbers
from neuclip_scale.trainer import Trainer

WAITING = {
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal",
    # Results whose size depends on values: boolean indices, unique, ...
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip
"""What waits for a GPU where the tensors are there. On a CPU the profiler sees the same calls."""

OPTIMIZER = "aten::_fused_adamw_"
"""One kernel for all parameters. The CPU's reads their step counts on the host, where they are; the GPU's does not."""


def waits(trainer: Trainer) -> Counter[str]:
    """Calls that would wait while the third step is launched, up to and with its numbers' way to the host."""
    made_on_the_host = Counter[str]()
    batches = iter(trainer.loader)
    for _ in range(2):
        trainer.train_step(next(batches).batch)
    loaded = next(batches)

    def new_tensor(like: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        made_on_the_host["new_tensor"] += 1
        return torch.tensor(*given, **{"dtype": like.dtype, **options})

    with (
        patch.object(torch.Tensor, "new_tensor", new_tensor),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        result = trainer.train_step(loaded.batch)
        QueuedNumbers(result, loaded)
    names = Counter(event.name for event in profiler.events() if not inside(event, OPTIMIZER))
    assert names["aten::mm"] > 0, "the profiler has not seen the step"
    assert any(event.name == OPTIMIZER for event in profiler.events())
    return Counter({name: count for name, count in names.items() if name in WAITING}) + made_on_the_host


def inside(event: Any, name: str) -> bool:
    """Whether one of the calls that led to `event` is of `name`."""
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


@pytest.mark.parametrize("micro_batch_size", [0, 4])
@pytest.mark.parametrize(
    "name", ["openclip", "siglip", "neuclip", "fastclip-v3", "fastclip-v2", "rgcl-g", "neuclip-queue"]
)
def test_no_step_waits(name: str, micro_batch_size: int, shards: Path, runs: Path) -> None:
    options = {"model.preset": "toy", "objective.name": name, "objective.gamma_min": 0.2}
    options |= {"train.micro_batch_size": micro_batch_size, "train.max_grad_norm": 1.0, "optim.ema_decay": 0.9}
    options |= {"objective.queue.project_anew": True}
    assert waits(Trainer(recipe(shards, runs / "run", **options))) == {}


def test_a_wait_would_be_seen(shards: Path, runs: Path) -> None:
    class Waiting(Trainer):
        def train_step(self, *given: object) -> object:  # type: ignore[override]
            result = super().train_step(*given)  # type: ignore[arg-type]
            result.output.loss.new_tensor(result.output.loss.item())
            return result

    found = waits(Waiting(recipe(shards, runs / "run", **{"model.preset": "toy", "objective.name": "openclip"})))
    assert found == {"aten::item": 1, "aten::_local_scalar_dense": 1, "new_tensor": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own watch is for GPUs")
@pytest.mark.parametrize("name", ["openclip", "siglip", "neuclip", "fastclip-v3", "fastclip-v2", "neuclip-queue"])
def test_no_step_waits_for_a_gpu(name: str, shards: Path, runs: Path) -> None:
    """Neither for copies from the host's memory, nor for the stream to read the numbers of the step before."""
    options = {"model.preset": "toy", "objective.name": name, "objective.gamma_min": 0.2, "engine.device": "cuda"}
    trainer = Trainer(recipe(shards, runs / "run", **options))
    batches, launched = iter(trainer.loader), list[QueuedNumbers]()
    for number in range(3):
        loaded = next(batches)
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            batch = loaded.batch.to(trainer.device, non_blocking=True)
            launched.append(QueuedNumbers(trainer.train_step(batch), loaded))
            if number == 2:
                assert launched[1].read().num_read == 8
        finally:
            torch.cuda.set_sync_debug_mode("default")
