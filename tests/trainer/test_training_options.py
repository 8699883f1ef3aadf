"""Options that trade speed, memory and stability: what they change, and what they must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainer_helpers import assert_same, logged_steps, recipe

from neuclip_scale.trainer import Trainer


def train(shards: Path, run_dir: Path, **options: Any) -> list[dict[str, Any]]:
    """Steps of a finished run of four."""
    Trainer(recipe(shards, run_dir, **{"train.num_steps": 4, **options})).fit()
    return logged_steps(run_dir)


def test_bf16_stays_near_fp32(shards: Path, runs: Path) -> None:
    options = {"train.micro_batch_size": 4}
    full = train(shards, runs / "fp32", **options)
    half = train(shards, runs / "bf16", **options, **{"train.precision": "bf16"})
    losses = torch.tensor([[line["loss"] for line in run] for run in (full, half)])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0.0)
    assert not torch.equal(losses[1], losses[0]), "bf16 was not used"


def test_grad_checkpointing_changes_no_number(shards: Path, runs: Path) -> None:
    """With dropout and micro-batches: a block is encoded three times, under the same random numbers."""
    options = {"model.dropout": 0.1, "train.micro_batch_size": 3}
    plain = train(shards, runs / "plain", **options)
    checkpointed = train(shards, runs / "checkpointed", **options, **{"model.grad_checkpointing": True})
    assert_same(checkpointed, plain)


def test_micro_batches_change_rounding_only(shards: Path, runs: Path) -> None:
    # Adam divides by |g| + eps: where a gradient is nearly zero, eps = 1e-6 turns rounding into whole updates.
    options = {"optim.eps": 1e-3}
    whole = train(shards, runs / "whole", **options)
    parts = train(shards, runs / "parts", **options, **{"train.micro_batch_size": 3})
    for key in ("loss", "grad_norm", "logit_scale"):
        expected, found = (torch.tensor([line[key] for line in run]) for run in (whole, parts))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class WatchedTrainer(Trainer):
    """Keeps the norm of the gradients that each update uses."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.used_norms: list[Tensor] = []
        self.engine.optimizer.register_step_pre_hook(self._keep)

    def _keep(self, *_: object) -> None:
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        self.used_norms.append(torch.nn.utils.get_total_norm(gradients))


def test_max_grad_norm_clips_and_logs_the_norm_before(shards: Path, runs: Path) -> None:
    options = {"train.num_steps": 3, "train.micro_batch_size": 4}
    free = WatchedTrainer(recipe(shards, runs / "free", **options))
    free.fit()
    clipped = WatchedTrainer(recipe(shards, runs / "clipped", **options, **{"train.max_grad_norm": 0.5}))
    clipped.fit()
    free_norms, clipped_norms = (
        [line["grad_norm"] for line in logged_steps(runs / name)] for name in ("free", "clipped")
    )
    assert all(norm > 0.5 for norm in free_norms), "nothing to clip"
    torch.testing.assert_close(torch.stack(free.used_norms), torch.tensor(free_norms))
    torch.testing.assert_close(torch.stack(clipped.used_norms), torch.full((3,), 0.5), rtol=1e-4, atol=0)
    assert clipped_norms[0] == free_norms[0]
