"""The planned memory against what is really held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from neuclip_scale import cli
from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.models.building import build_model, plan_model
from neuclip_scale.planning import MemoryItem, plan_memory, saved_bytes


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("demo", overrides)


def items(config: Recipe, world_size: int, dataset_size: int = 0) -> dict[str, MemoryItem]:
    return {item.name: item for item in plan_memory(config, world_size, dataset_size).items}


def test_activations_are_those_of_a_real_forward_pass() -> None:
    """Distinct storages that autograd saves on the CPU, for two batch sizes: the difference is what pairs add."""
    model = build_model(recipe()).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def measured(pairs: int) -> int:
        held: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                held[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(pairs, 3, 32, 32), torch.randint(1, 9, (pairs, 16)))
        del output
        return sum(size for size, _ in held.values())

    real = (measured(12) - measured(4)) / 8
    # The meta device keeps attention's scores, which the CPU's fused kernel does not: 5 heads of 17 x 17 and 2 of
    # 16 x 16, a few copies in each block.
    scores = 4 * (4 * 5 * 17**2 + 2 * 2 * 16**2)
    assert real <= saved_bytes(plan_model(recipe())) <= real + 4 * scores


def test_checkpointing_keeps_less() -> None:
    whole, checkpointed = (
        saved_bytes(plan_model(recipe(**{"model.preset": "ViT-B-32", "model.grad_checkpointing": on})))
        for on in (False, True)
    )
    inputs = 4 * (12 * 50 * 768 + 12 * 77 * 512)  # fp32, one for each block
    assert inputs < checkpointed < inputs + whole / 8


def test_the_formula_of_each_engine() -> None:
    N = sum(parameter.numel() for parameter in plan_model(recipe()).parameters())
    found = items(recipe(), 4)
    assert [found[name].device for name in ("parameters", "gradients", "optimizer")] == [4 * N, 4 * N, 8 * N]
    assert "gathered parameters" not in found
    part = -(-4 * N // 4)
    found = items(recipe(**{"engine.name": "fsdp2"}), 4)
    assert [found[name].device for name in ("parameters", "gradients")] == [part, part]
    # Several micro-batches gather the gradients' sum whole, unless it is reduced in each.
    several = {"engine.name": "fsdp2", "train.micro_batch_size": 16, "optim.ema_decay": 0.99}
    found = items(recipe(**several), 4)
    assert [found[name].device for name in ("gradients", "running average")] == [4 * N, part]
    assert items(recipe(**several, **{"engine.fsdp.accumulate_sharded": True}), 4)["gradients"].device == part
    zero3 = {"engine.name": "deepspeed", "engine.deepspeed.config": "zero3_offload"}
    found = items(recipe(**zero3), 4)
    assert found["parameters"] == MemoryItem("parameters", 0, part, "4 bytes each, over 4 ranks")
    assert (found["optimizer"].device, found["optimizer"].host) == (0, 3 * N)


def test_tables_are_spread_and_locked_towers_have_no_gradients() -> None:
    n = 1_000_000_000
    table = items(recipe(**{"objective.name": "fastclip-v3"}), 4, n)["normalizers"].device
    assert table == pytest.approx(8 * n / 4, rel=1e-6)
    model = plan_model(recipe())
    text = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("visual."))
    locked = items(recipe(**{"model.lock": "image"}), 1)
    assert locked["gradients"].device == 4 * text
    assert locked["activations"].device < items(recipe(), 1)["activations"].device / 2


@pytest.mark.parametrize(("preset", "millions"), [("ViT-L-14", 427.6), ("ViT-H-14", 986.1)])
def test_the_plan_of_large_models_is_printed(
    preset: str, millions: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At full size, in seconds, on any machine; the numbers of parameters are open_clip's."""
    arguments = ["plan", "datacomp_xlarge", f"model.preset={preset}", "engine.name=fsdp2", "--world-size", "128"]
    assert cli.main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
    assert f"{millions:,.1f} M parameters" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_bytes())
    assert plan["parameters"] == pytest.approx(1e6 * millions, rel=1e-3)
    assert plan["device_bytes"] == sum(item["device"] for item in plan["items"]) < 80 * 2**30
