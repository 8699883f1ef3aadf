"""The planned traffic against what real gloo ranks send: byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from collectives import each, sent_in_a_step
from ranks import run_ranks

from neuclip_scale.config import ObjectiveName, load_recipe
from neuclip_scale.planning.traffic import plan_traffic

pytestmark = pytest.mark.distributed

NUM_PAIRS = 50
Case = dict[str, Any]


def zero(name: str) -> Case:
    return {"engine.name": "deepspeed", "engine.deepspeed.config": name}


FSDP2: Case = {"engine.name": "fsdp2"}
SEVERAL: Case = {"train.micro_batch_size": 4}
LOCKED: Case = {"model.lock": "image", "objective.name": "openclip"}
# By engine and number of ranks; each of "fsdp2" and "zero" has other rules for one micro-batch and for several.
CASES: dict[str, tuple[int, list[Case]]] = {
    "objectives": (2, [{"objective.name": name} for name in get_args(ObjectiveName) if name != "exact"]),
    "ddp": (2, [SEVERAL, LOCKED, SEVERAL | {"train.precision": "bf16"}]),
    "fsdp2": (
        2,
        [
            FSDP2,
            FSDP2 | SEVERAL | {"train.max_grad_norm": 0.5},
            FSDP2 | SEVERAL | {"engine.fsdp.accumulate_sharded": True},
            FSDP2 | SEVERAL | {"engine.fsdp.reshard_after_forward": False},
            FSDP2 | {"train.precision": "bf16", "model.grad_checkpointing": True},
            FSDP2 | LOCKED,
            FSDP2 | SEVERAL | LOCKED,
            FSDP2 | SEVERAL | {"model.lock": "text", "model.unlocked_layers": 1},
        ],
    ),
    "fsdp2, 2 x 2 ranks": (4, [FSDP2 | {"engine.fsdp.replicas": 2}]),
    "zero": (
        2,
        [
            zero("zero0"),
            zero("zero1") | SEVERAL,
            zero("zero2") | SEVERAL | {"train.precision": "bf16"},
            zero("zero2") | {"optim.image.layer_decay": 0.5},
            zero("zero3"),
            zero("zero3") | SEVERAL | {"train.precision": "bf16"},
            zero("whole3") | SEVERAL,
            zero("whole3") | LOCKED | {"train.precision": "bf16"},
            zero("forgets3"),
        ],
    ),
}


def overrides(folder: str, case: Case) -> Case:
    if case.get("engine.deepspeed.config") in ("whole3", "forgets3"):
        case = case | {"engine.deepspeed.config": str(Path(folder) / f"{case['engine.deepspeed.config']}.json")}
    return {
        "data.train": str(Path(folder) / "shards"),
        "model.preset": "toy",
        "data.num_workers": 0,
        "data.num_streams": 4,
        "data.shuffle_window": 8,
        "evaluation.data": "",
        "evaluation.normalizer_every_steps": 0,
        "objective.npn.num_prototypes": 40,
        "objective.npn.updates_per_step": 3,
        "objective.queue.size": 100,
        "train.global_batch_size": 24,
        "train.num_steps": 9,
        **case,
    }


@pytest.fixture(scope="module")
def settings(folder: str) -> str:
    """Everything partitioned, and nothing kept for the backward pass."""
    for name, distance in {"whole3": 10**9, "forgets3": 1}.items():
        zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": distance, "stage3_max_live_parameters": max(1, distance)}
        (Path(folder) / f"{name}.json").write_text(json.dumps({"zero_optimization": zero3}))
    return folder


@pytest.mark.parametrize("label", CASES)
def test_a_rank_sends_what_was_planned(settings: str, label: str) -> None:
    world_size, cases = CASES[label]
    made = [overrides(settings, case) for case in cases]
    measured = run_ranks(world_size, each, settings, made, sent_in_a_step)[0]
    for case, config, found in zip(cases, made, measured):
        planned: dict[str, int] = {}
        for transfer in plan_traffic(load_recipe("demo", config), world_size, NUM_PAIRS):
            planned[transfer.kind] = planned.get(transfer.kind, 0) + transfer.payload
        assert planned == found, case
