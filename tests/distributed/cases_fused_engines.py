"""Engines make one process's updates with the towers' own kernels. Run by test_fused_engines.py, in Triton's
interpreter."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_helpers import ENGINES, Overrides, assert_same, train
from ranks import run_ranks

from neuclip_scale.models import transformer
from neuclip_scale.models.presets import PRESETS, VisionTransformerConfig
from neuclip_scale.models.transformer import Attention, LinearGELU

# Pictures of 170 tokens in two blocks, heads of 64, and a step of two micro-batches on each of two ranks.
RUN: Overrides = {
    "model.preset": "short", "model.image_size": 26, "train.global_batch_size": 4, "train.micro_batch_size": 1,
    "train.max_grad_norm": 0.5, "objective.name": "openclip",
    "evaluation.normalizer_every_steps": 0, "train.num_steps": 2,
}  # fmt: skip


def trained(folder: str, label: str, more: Overrides, fused: bool) -> dict[str, Any]:
    toy = PRESETS["toy"]
    PRESETS["short"] = replace(toy, image=VisionTransformerConfig(patch_size=2, width=64, heads=1, layers=2))
    for layer, module in ((LinearGELU, "gelu"), (Attention, "attention")):
        importlib.import_module(f"neuclip_scale.models.triton_{module}")
        layer.fused = fused
    transformer.FUSED_DTYPES = (torch.float32,)  # interpreted, the kernels take it, and it shows more
    launches: list[str] = []
    if fused:
        count_launches(launches)
    result = train(folder, label, RUN | more)
    return result | {"launches": launches}


def count_launches(launches: list[str]) -> None:
    """Note which kernels run."""
    for name in ("gelu", "attention"):
        module = importlib.import_module(f"neuclip_scale.models.triton_{name}")
        launch = module._launch
        module._launch = lambda kernel, *rest, name=name, launch=launch: (launches.append(name), launch(kernel, *rest))


@pytest.fixture(scope="module")
def single(folder: str) -> dict[str, Any]:
    """Without kernels, and with one micro-batch."""
    return trained(folder, "single", {"train.micro_batch_size": 0}, fused=False)


@pytest.mark.parametrize("label", ["ddp, 2 ranks", "fsdp2, 2 ranks", "zero2, 2 ranks"])
def test_an_engine_makes_the_updates_of_one_process(folder: str, single: dict[str, Any], label: str) -> None:
    """Weights and moments to 2e-5, losses and norms to 1e-5. (ZeRO 3 does not compile towers.)"""
    engine = ENGINES[label if label in ENGINES else "zero2, 1 rank"][1]
    (result, *_) = run_ranks(2, trained, folder, label, engine, True)
    assert set(result["launches"]) == {"gelu", "attention"}
    assert_same(result, single, weights=2e-5, losses=1e-5)
