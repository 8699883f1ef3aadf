"""Plans of whole runs: formulas of memory, the roofline, the choice, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from neuclip_scale import cli
from neuclip_scale.config import ConfigError, Recipe, load_recipe, num_micro_batches
from neuclip_scale.models.building import build_model, plan_model
from neuclip_scale.planning import (
    GPU_TYPES,
    Assumptions,
    MemoryItem,
    Site,
    plan_memory,
    plan_run,
    plan_time,
    plan_traffic,
)
from neuclip_scale.planning.budget import KNOWN_SETS
from neuclip_scale.planning.choosing import choose, consider
from neuclip_scale.planning.memory import encoder_trace
from neuclip_scale.planning.sharding import model_sizes
from neuclip_scale.planning.tracing import trace_encoders
from neuclip_scale.planning.traffic import Transfer
from neuclip_scale.telemetry.flops import encoder_flops

RECIPES = [path.stem for path in (Path(cli.__file__).parent / "recipes").glob("*.yaml")]
H100 = GPU_TYPES["h100"]


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("demo", overrides)


def items(config: Recipe, world_size: int, dataset_size: int = 0) -> dict[str, MemoryItem]:
    return {item.name: item for item in plan_memory(config, world_size, dataset_size).items}


def test_kept_activations_are_those_of_a_real_forward_pass() -> None:
    """Distinct storages that autograd saves on the CPU, at two sizes that the plan was not made from."""
    model = build_model(recipe()).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def measured(pairs: int) -> int:
        held: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                held[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        images, tokens = torch.randn(pairs, 3, 32, 32), torch.randint(1, 9, (pairs, 16))
        inputs = {images.untyped_storage().data_ptr(), tokens.untyped_storage().data_ptr()}
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(images, tokens)
        del output
        return sum(size for place, (size, _) in held.items() if place not in inputs)

    planned = trace_encoders(plan_model(recipe()), "fp32").forward
    for pairs in (4, 13):
        # What the output itself holds is no saved tensor: features of both sides.
        assert planned.last(pairs) == pytest.approx(measured(pairs), rel=0.01)


def test_checkpointing_keeps_less() -> None:
    whole, checkpointed = (
        encoder_trace(recipe(**{"model.preset": "ViT-B-32", "model.grad_checkpointing": on}).model, "bf16", False)
        for on in (False, True)
    )
    # One for each block, in bf16.
    inputs = 2 * 12 * (50 * 768 + 77 * 512)
    assert inputs < checkpointed.forward.slope[-1] < inputs + whole.forward.slope[-1] / 8
    assert checkpointed.training.peak(64) < whole.training.peak(64) / 4


def test_the_formula_of_each_engine() -> None:
    N = sum(parameter.numel() for parameter in plan_model(recipe()).parameters())
    found = items(recipe(), 4)
    assert [found[name].device for name in ("parameters", "gradients", "optimizer")] == [4 * N, 4 * N, 8 * N]
    assert "gathered parameters" not in found
    part = math.ceil(4 * N / 4)
    found = items(recipe(**{"engine.name": "fsdp2"}), 4)
    assert [found[name].device for name in ("parameters", "gradients")] == [part, part]
    # Several micro-batches gather the gradients' sum whole, unless it is reduced in each.
    several = {"engine.name": "fsdp2", "train.micro_batch_size": 16, "optim.ema_decay": 0.99}
    found = items(recipe(**several), 4)
    assert [found[name].device for name in ("whole gradients", "running average")] == [4 * N, part]
    assert "whole gradients" not in items(recipe(**several, **{"engine.fsdp.accumulate_sharded": True}), 4)
    zero3 = {"engine.name": "deepspeed", "engine.deepspeed.config": "zero3_offload"}
    found = items(recipe(**zero3), 4)
    assert found["parameters"] == MemoryItem("parameters", 0, part, "4 bytes each, over 4 ranks")
    assert (found["optimizer"].device, found["optimizer"].host) == (0, 3 * N)
    # DeepSpeed allocates its buffers whole, however small the model is.
    zero2 = {"engine.name": "deepspeed", "engine.deepspeed.config": "zero2"}
    assert items(recipe(**zero2), 4)["reduction buffers"].device == 2 * 4 * 500_000_000


def test_tables_are_spread_and_locked_towers_have_no_gradients() -> None:
    n = 1_000_000_000
    table = items(recipe(**{"objective.name": "fastclip-v3"}), 4, n)["u table"].device
    assert table == pytest.approx(8 * n / 4, rel=1e-6)
    model = plan_model(recipe())
    text = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("visual."))
    locked = items(recipe(**{"model.lock": "image"}), 1)
    assert locked["gradients"].device == 4 * text
    assert locked["activations"].device < items(recipe(), 1)["activations"].device / 2


@pytest.mark.parametrize(
    ("kind", "sent"), [("all_gather", 75), ("all_to_all", 75), ("reduce_scatter", 75), ("all_reduce", 150)]
)
def test_a_ring_sends_all_parts_but_one(kind: Any, sent: int) -> None:
    assert Transfer("", kind, 100, 4, True).sent == sent


def test_packed_captions_shorten_the_step() -> None:
    """By the text tower's share of what they leave out; and lengths that no packing has are refused."""
    config, whole = recipe(**{"train.precision": "bf16", "model.preset": "ViT-B-32"}), Assumptions(operation_us=0.0)
    plans = [
        plan_time(config, Site(gpu=H100, world_size=4, assume=dataclasses.replace(whole, caption_tokens=tokens)))
        for tokens in (0.0, 77.0, 24.0)
    ]
    assert plans[0] == plans[1]
    flops = encoder_flops(config.model, plan_model(config))
    text = flops.text_forward / flops.forward
    # Attention's products are a hundredth of the tower's at this length.
    assert plans[2].encoders / plans[0].encoders == pytest.approx(1 - text * (1 - 24 / 77), abs=0.01)
    assert plans[2].encoders / plans[0].encoders == pytest.approx(plans[2].model_flops / plans[0].model_flops)
    for packs, tokens, message in ((True, 78.0, "longer than the context of 77"), (False, 24.0, "packs no captions")):
        refused = recipe(**{"model.preset": "ViT-B-32", "model.pack_captions": packs})
        site = Site(gpu=H100, world_size=4, assume=Assumptions(caption_tokens=tokens))
        with pytest.raises(ConfigError, match=message):
            plan_time(refused, site)


def test_the_roofline_is_its_parts() -> None:
    """Encoders alone, by hand; twice the efficiency halves them; a slow network and a slow host are waited for."""
    config = recipe(**{"train.precision": "bf16", "train.global_batch_size": 4096})
    site = Site(gpu=H100, world_size=4, assume=Assumptions(operation_us=0.0))
    time = plan_time(config, site)
    assert time.encoders == pytest.approx(time.hardware_flops / (989.5e12 * 0.4))
    assert time.hardware_flops == time.model_flops  # one micro-batch, no checkpointing
    assert time.seconds == pytest.approx(time.encoders + time.objective + time.update + sum(time.waits.values()))
    faster = plan_time(config, dataclasses.replace(site, assume=Assumptions(operation_us=0.0, compute=0.8)))
    assert faster.encoders == pytest.approx(time.encoders / 2)
    slow = dataclasses.replace(H100, network=1e6, nvlink=1e6)
    waited = plan_time(config, dataclasses.replace(site, gpu=slow))
    assert waited.hidden - waited.encoders <= waited.exposed <= waited.hidden
    two = {"train.global_batch_size": 4096, "train.micro_batch_size": 512}  # for each of 4 ranks
    both, second = (plan_time(recipe(**two, **{"train.kept_micro_batches": kept}), site) for kept in (0, 1))
    assert both.hardware_flops > 1.3 * both.model_flops
    assert second.hardware_flops - time.model_flops == pytest.approx((both.hardware_flops - time.model_flops) / 2)
    assert recipe(**two).train.kept_micro_batches == 1
    host = plan_time(config, dataclasses.replace(site, assume=Assumptions(operation_us=5.0)))
    assert host.encoders - host.starting == pytest.approx(time.encoders)
    trace = encoder_trace(config.model, "bf16", False)
    assert host.encoders == pytest.approx(5e-6 * trace.training_operations)


@pytest.mark.long
def test_the_choice_fits_and_says_what_to_add() -> None:
    """A GPU with room for the parameters and little else: smaller micro-batches, checkpointing, shards."""
    config = recipe(**{"train.global_batch_size": 65536, "data.num_streams": 8})
    whole = plan_memory(config, 8).device
    tight = dataclasses.replace(H100, memory=whole // 2)
    choice = choose(config, Site(gpu=tight, world_size=8))
    assert not choice.recipe.fits
    assert choice.best is not None
    assert choice.best.fits
    assert choice.best.memory.device <= tight.memory
    # What it prints is a recipe that fits by itself.
    again = plan_memory(load_recipe("demo", {**choice.best.overrides, "train.global_batch_size": 65536,
                                             "data.num_streams": 8}), 8)  # fmt: skip
    assert again.device == choice.best.memory.device
    hopeless = choose(config, Site(gpu=dataclasses.replace(H100, memory=2**30), world_size=8))
    assert hopeless.best is None
    assert not any(option.fits for option in hopeless.options)


def test_what_memory_is_left_keeps_activations() -> None:
    """Ways that keep some are faster for it, and one micro-batch more would not fit."""
    config = recipe(**{"train.global_batch_size": 65536, "train.precision": "bf16"})
    site = Site(gpu=dataclasses.replace(H100, memory=plan_memory(config, 1).device // 8), world_size=1)
    options = [option for option in choose(config, site).options if option.fits]
    keeping = [option for option in options if option.config.train.kept_micro_batches]
    assert options[0] in keeping
    for option in keeping:
        without = consider(option.config, site, {"train.kept_micro_batches": 0, "train.kept_tower": ""})
        assert option.time.encoders < without.time.encoders
        kept = option.config.train.kept_micro_batches + 1
        if kept < num_micro_batches(option.config, 1):
            assert not consider(option.config, site, {"train.kept_micro_batches": kept}).fits


def test_tiles_shrink_where_they_are_what_does_not_fit() -> None:
    """Those of `exact`, which torch multiplies; other similarities have Triton's chunks, whatever the tile."""
    sizes = {"train.global_batch_size": 65536, "train.micro_batch_size": 8, "objective.name": "exact"}
    config, small = (recipe(**sizes, **{"objective.tile_size": tile}) for tile in (32768, 512))
    pairs = 100_000
    tight = dataclasses.replace(H100, memory=plan_memory(small, 1, pairs).device + 2**20)
    choice = choose(config, Site(gpu=tight, world_size=1, dataset_size=pairs))
    assert not choice.recipe.fits
    assert choice.best is not None
    assert choice.best.overrides["objective.tile_size"] <= 4096


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("cc3m", "demo") else pytest.mark.long) for name in sorted(RECIPES)]
)
def test_every_packaged_recipe_fits_on_its_machines(name: str) -> None:
    """At full size, on any machine: as many GPUs as its authors had, or one node."""
    nodes = {"datacomp_xlarge": 16, "datacomp_large": 2}.get(name, 1)
    config = load_recipe(name, {"data.num_streams": 8} if name == "demo" else {})
    plan = plan_run(config, Site(gpu=H100, world_size=8 * nodes, price=2.0), alternatives=False)
    assert plan.fits, plan.choice.recipe.problem
    budget = plan.budget
    assert budget.num_steps > 0
    assert budget.price == pytest.approx(2 * budget.gpu_hours)
    assert budget.days * 24 * 8 * nodes == pytest.approx(budget.gpu_hours)
    assert json.loads(json.dumps(plan.document()))["as_written"]["fits"] is True
    if name in KNOWN_SETS:
        assert budget.dataset_size == KNOWN_SETS[name]


def test_a_length_in_epochs_needs_the_number_of_pairs() -> None:
    config = dataclasses.replace(load_recipe("cc3m"), name="mine")
    with pytest.raises(ConfigError, match="--dataset-size"):
        plan_run(config, Site(gpu=H100, world_size=8), alternatives=False)


@pytest.mark.parametrize(("preset", "millions"), [("ViT-L-14", 427.6), ("ViT-H-14", 986.1)])
def test_large_models_are_counted_whole(preset: str, millions: float) -> None:
    """The numbers of parameters are open_clip's."""
    sizes = model_sizes(load_recipe("datacomp_xlarge", {"model.preset": preset}))
    assert sizes.total == pytest.approx(1e6 * millions, rel=1e-3)
    assert sizes.total == sum(group.size for group in sizes.groups)
    assert sum(sizes.optimizer_groups) == sizes.trained


def test_the_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    arguments = ["plan", "datacomp_xlarge", "--nodes", "16", "--gpu", "h200", "--no-alternatives", "--json", str(path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "427.6 M parameters" in printed
    assert "fits as it stands" in printed
    plan = json.loads(path.read_bytes())
    memory = plan["as_written"]["memory"]
    assert memory["device_bytes"] == max(memory["bytes_at"].values()) < 141e9
    assert plan["budget"]["num_steps"] == 142045
    assert plan["as_written"]["bytes_sent_per_step"] == sum(each["sent"] for each in plan["as_written"]["transfers"])


def test_a_hybrid_mesh_keeps_parameters_off_the_network() -> None:
    """Shards within a node travel by NVLink, counterparts by one card each."""
    site = Site(gpu=H100, world_size=16)
    assert site.bandwidth(8, "neighbours") == H100.nvlink
    assert site.bandwidth(2, "counterparts") == H100.network
    assert site.bandwidth(16, "all") == min(H100.nvlink, 8 * H100.network)
    config = recipe(**{"engine.name": "fsdp2", "engine.fsdp.replicas": 2, "data.num_streams": 16})
    groups = {transfer.name: (transfer.group, transfer.ranks) for transfer in plan_traffic(config, 16)}
    assert groups["parameters, forward"] == ("neighbours", 8)
    assert groups["gradients, replicas"] == ("counterparts", 2)


def test_exit_status_1_refuses_and_2_is_a_recipe_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    too_much = ["plan", "demo", "train.global_batch_size=4194304", "--world-size", "4", "--gpu", "a100-40"]
    assert cli.main(too_much) == 1
    output = capsys.readouterr()
    assert "error: demo does not fit" in output.err
    assert "train.micro_batch_size=" in output.err  # the remedy
    assert cli.main(["plan", "demo", "--nodes", "3", "--gpu", "h100", "--gpus-per-node", "8"]) == 2
    assert "data.num_streams" in capsys.readouterr().err
    assert cli.main(["plan", "demo", "--nodes", "0"]) == 2
    assert "--nodes" in capsys.readouterr().err
    assert cli.main(["plan", "demo", "--world-size", "4", "--assume.compute", "0"]) == 2
    assert "--assume.compute" in capsys.readouterr().err


def test_a_name_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "demo", "--world-size", "1", "--no-alternatives", 'name="x[/b] :cat:"']) == 0
    assert "x[/b] :cat: fits as it stands" in capsys.readouterr().out
