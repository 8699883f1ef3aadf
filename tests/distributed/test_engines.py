"""Every engine makes the updates of one process."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from engine_helpers import ENGINES, Overrides, assert_same, train
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.config import ObjectiveName

pytestmark = pytest.mark.distributed

# What differs between the runs of one engine. tau is driven against its bound: sharded, it must be clamped too.
RUNS: dict[str, Overrides] = {
    "clip": {"train.max_grad_norm": 0.5},
    "micro clip checkpointing": {
        "train.micro_batch_size": 5, "train.max_grad_norm": 0.5, "model.grad_checkpointing": True,
        "objective.temperature_min": 0.0699, "optim.temperature_learning_rate": 0.05, "optim.ema_decay": 0.5,
        "objective.exchange": "ring", "model.text_layers": 2,
    },
    "siglip": {"objective.name": "siglip", "objective.exchange": "ring", "train.micro_batch_size": 5},
    "openclip": {
        "objective.name": "openclip", "model.lock": "image", "model.unlocked_layers": 2,
        "optim.image.layer_decay": 0.5, "optim.text.learning_rate_factor": 0.5, "optim.text.weight_decay_factor": 3.0,
    },
    "fastclip-v3": {
        "objective.name": "fastclip-v3", "train.micro_batch_size": 4, "train.kept_micro_batches": 2,
        "train.kept_tower": "text", "model.text_layers": 2,
    },
    "queue": {"objective.name": "neuclip-queue", "objective.queue.project_anew": True, "train.micro_batch_size": 5},
    "exact": {"objective.name": "exact", "model.lock": "text", "optim.ema_decay": 0.5},
}  # fmt: skip


LONG = (
    "fsdp2, 1 rank",
    "fsdp2, 2 ranks, offload",
    "zero2, 4 ranks",
    "zero2_offload, 2 ranks",
    "zero3_offload, 4 ranks",
)
"""Layouts near to others."""
LAYOUTS = [pytest.param(label, marks=pytest.mark.long if label in LONG else ()) for label in ENGINES]
SHARDED = ("clip", "micro clip checkpointing", "openclip", "fastclip-v3", "queue", "exact")
VARIANT = ("micro clip checkpointing", "openclip")


def runs_of(label: str) -> tuple[str, ...]:
    """Objectives' state is no engine's affair, and layouts differ little: `make parity` does the whole product."""
    if label in ("single", "ddp, 2 ranks"):
        return tuple(RUNS)
    return SHARDED if label in ("fsdp2, 2 ranks", "zero3, 2 ranks") else VARIANT


def train_all(folder: str, label: str, engine: Overrides) -> dict[str, Any]:
    results = {}
    for name in runs_of(label):
        results[name] = train(folder, f"{label}-{name}", RUNS[name] | engine)
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(Path(folder) / f"{label}-{name}")
    return results


@pytest.fixture(scope="module")
def single(folder: str) -> dict[str, Any]:
    """With every caption padded to the context, where the ranks pack theirs, each in its own way."""
    return train_all(folder, "single", {"model.pack_captions": False})


@pytest.mark.parametrize("label", LAYOUTS)
def test_an_engine_makes_the_updates_of_one_process(folder: str, single: dict[str, Any], label: str) -> None:
    """Weights and moments to 2e-5, losses and norms to 1e-5, with every kind of objective state."""
    world_size, engine = ENGINES[label]
    ranks = run_ranks(world_size, train_all, folder, label, engine)
    for name in runs_of(label):
        assert_same(ranks[0][name], single[name], weights=2e-5, losses=1e-5)


PRODUCT: dict[str, Overrides] = {
    f"{objective} micro {micro} clip {clip} checkpointing {checkpointing}": {
        "objective.name": objective, "train.micro_batch_size": micro, "train.max_grad_norm": clip,
        "model.grad_checkpointing": checkpointing, "model.preset": "toy", "evaluation.normalizer_every_steps": 0,
    }
    for objective in get_args(ObjectiveName)
    for micro, clip, checkpointing in itertools.product((0, 3), (0.0, 0.5), (False, True))
}  # fmt: skip
"""Every objective with one and with several micro-batches, clipping off and on, checkpointing off and on."""


def differences(folder: str, label: str, engine: Overrides) -> list[str]:
    """The runs of the product that differ from one process's, and by how much."""
    found = []
    for number, (name, run) in enumerate(PRODUCT.items()):
        result = train(folder, f"{label} {number}", run | engine)
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(Path(folder) / f"{label} {number}")
            expected = torch.load(Path(folder) / f"expected {number}.pt", weights_only=True)
            try:
                assert_same(result, expected, weights=2e-5, losses=1e-5)
            except AssertionError as error:
                found.append(f"{name}: {error}")
    return found


@pytest.fixture(scope="module")
def product_folder(folder: str) -> str:
    for number, run in enumerate(PRODUCT.values()):
        torch.save(train(folder, f"single {number}", run), Path(folder) / f"expected {number}.pt")
        shutil.rmtree(Path(folder) / f"single {number}")
    return folder


@pytest.mark.skipif(not os.environ.get("NEUCLIP_PARITY"), reason="the whole product takes an hour: make parity")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("label", ENGINES)
def test_the_whole_product(product_folder: str, label: str) -> None:
    """Engines x objectives x ranks x micro-batches x clipping x checkpointing, three steps each."""
    world_size, engine = ENGINES[label]
    found = run_ranks(world_size, differences, product_folder, label, engine)[0]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "label",
    [
        "ddp, 2 ranks",
        "zero3, 2 ranks",
        *(
            pytest.param(label, marks=pytest.mark.long)
            for label in ("fsdp2, 2 ranks", "zero0, 2 ranks", "zero2, 4 ranks")
        ),
    ],
)
def test_bf16_stays_near_fp32(folder: str, single: dict[str, Any], label: str) -> None:
    """Weights to 1e-3, of steps of at most 1e-3 each; losses to 5e-3."""
    world_size, engine = ENGINES[label]
    (result, *_) = run_ranks(
        world_size, train, folder, f"bf16 {label}", engine | RUNS["clip"] | {"train.precision": "bf16"}
    )
    for name, state in single["clip"]["state"].items():
        torch.testing.assert_close(result["state"][name]["value"], state["value"], rtol=0, atol=1e-3)
    losses = [[step["loss"] for step in run["steps"]] for run in (result, single["clip"])]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=5e-3, atol=5e-3)
    assert losses[0] != losses[1], "bf16 must have been used"
