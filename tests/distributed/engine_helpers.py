"""Layouts of engines and ranks, and runs under them whose whole state comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from forking import preload_deepspeed

from neuclip_scale import distributed
from neuclip_scale.config import load_recipe

preload_deepspeed()
STEPS = 3

Overrides = dict[str, Any]

SAME = ("loss", "grad_norm", "logit_scale", "batch_digest", "content_digest")
"""Of a step, on any number of ranks."""


def zero(name: str) -> Overrides:
    return {"engine.name": "deepspeed", "engine.deepspeed.config": name}


FSDP2: Overrides = {"engine.name": "fsdp2"}
ENGINES: dict[str, tuple[int, Overrides]] = {
    "ddp, 2 ranks": (2, {}),
    "fsdp2, 1 rank": (1, FSDP2),
    "fsdp2, 2 ranks": (2, FSDP2),
    "fsdp2, 2 ranks, offload": (
        2,
        FSDP2 | {"engine.fsdp.cpu_offload": True, "engine.fsdp.reshard_after_forward": True},
    ),
    "fsdp2, 2 x 2 ranks": (4, FSDP2 | {"engine.fsdp.replicas": 2, "engine.fsdp.accumulate_sharded": True}),
    "zero0, 2 ranks": (2, zero("zero0")),
    "zero1, 2 ranks": (2, zero("zero1")),
    "zero2, 1 rank": (1, zero("zero2")),
    "zero2, 4 ranks": (4, zero("zero2")),
    "zero2_offload, 2 ranks": (2, zero("zero2_offload")),
    "zero3, 2 ranks": (2, zero("zero3")),
    "zero3_offload, 4 ranks": (4, zero("zero3_offload")),
}


def overrides(folder: str, run: str, more: Overrides) -> Overrides:
    return {
        "run_dir": str(Path(folder) / run),
        "data.train": str(Path(folder) / "shards"),
        "model.preset": "toy",
        "data.num_workers": 0,
        "data.num_streams": 4,
        "data.shuffle_window": 8,
        "evaluation.data": "",
        "evaluation.normalizer_every_steps": 2,  # a forward pass outside training
        "objective.tile_size": 5,
        "objective.npn.num_prototypes": 40,
        "objective.npn.restart_every": 2,
        "objective.queue.size": 37,
        "optim.warmup_steps": 2,
        # Adam divides by |g| + eps: where a gradient is nearly zero, eps = 1e-6 turns rounding into whole updates.
        "optim.eps": 1e-3,
        "train.global_batch_size": 24,
        "train.num_steps": STEPS,
        "checkpoint.every_steps": 0,
        **more,
    }


def train(folder: str, run: str, more: Overrides) -> dict[str, Any]:
    from neuclip_scale.trainer import Trainer

    trainer = Trainer(load_recipe("demo", overrides(folder, run, more)))
    trainer.fit()
    lines = (Path(folder) / run / "metrics.jsonl").read_text().splitlines() if distributed.is_main() else []
    logged = [json.loads(line) for line in lines]
    state = {
        # Collective; the same on every rank, and 100 MB.
        name: {key: tensor.clone() for key, tensor in tensors.items()} if distributed.is_main() else {}
        for name, tensors in trainer.engine.named_state()
    }
    return {
        "state": state,
        "steps": [{key: step[key] for key in SAME} for step in logged],
        "errors": [step["normalizer/mse"] for step in logged if "normalizer/mse" in step],
    }


def assert_same(result: dict[str, Any], expected: dict[str, Any], *, weights: float, losses: float) -> None:
    for key in ("loss", "grad_norm", "logit_scale"):
        mine, theirs = ([step[key] for step in run["steps"]] for run in (result, expected))
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=losses, atol=losses, msg=key)
    for key in ("batch_digest", "content_digest"):
        assert [s[key] for s in result["steps"]] == [s[key] for s in expected["steps"]]
    assert len(result["errors"]) == len(expected["errors"])  # of rank 0's own pairs, so other values
    assert result["state"].keys() == expected["state"].keys()
    for name, state in expected["state"].items():
        assert result["state"][name].keys() == state.keys(), name
        for key, tensor in state.items():
            torch.testing.assert_close(
                result["state"][name][key], tensor, rtol=weights, atol=weights, msg=f"{name} {key}"
            )
