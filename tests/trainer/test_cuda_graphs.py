"""Towers recorded as CUDA graphs make the updates of towers that are only compiled. Where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_helpers import recipe

from neuclip_scale.trainer import Trainer

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are of GPUs alone")]
IN_PARTS: dict[str, Any] = {
    "engine.device": "cuda", "train.precision": "bf16", "train.micro_batch_size": 2, "model.compile": True,
    "model.pack_captions": False,
}  # fmt: skip
WITH_GRAPHS: dict[str, Any] = {"model.cuda_graphs": True, "objective.npn.cuda_graphs": True}


def trained(data: Path, run_dir: Path, **overrides: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of every step, and the weights at the end."""
    torch._dynamo.reset()
    trainer = Trainer(recipe(data, run_dir, **IN_PARTS | overrides))
    losses, batches = [], iter(trainer.loader)
    for _ in range(5):
        losses.append(trainer.train_step(next(batches).batch).output.loss)
    return losses, {name: value.float().clone() for name, value in trainer.engine.module.state_dict().items()}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"train.kept_micro_batches": 2},
        {"train.kept_micro_batches": 0, "train.kept_tower": "text"},
        {"model.grad_checkpointing": True},
        {"objective.name": "neuclip"},
    ],
    ids=lambda case: ", ".join(f"{name}={value}" for name, value in case.items()) or "one kept",
)
def test_the_same_updates(case: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    plain = trained(shards, tmp_path / "plain", **case)
    graphs = trained(shards, tmp_path / "graphs", **case | WITH_GRAPHS)
    torch.testing.assert_close(graphs[0], plain[0], rtol=1e-3, atol=1e-4)
    for name, value in plain[1].items():
        torch.testing.assert_close(graphs[1][name], value, rtol=0, atol=2e-3 * float(value.abs().max()), msg=name)
