"""What is planned of Triton's kernels: their constants, and memory and speed against what was measured on one H200."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from neuclip_scale.config import Recipe, load_recipe, matmul_precision
from neuclip_scale.planning import GPU_TYPES, Assumptions, Site, kernels, plan_memory, plan_time
from neuclip_scale.planning.kernels import BLOCK, DIM_STEP, MIN_DIM, NPN_BYTES, by_triton, npn_bytes, similarity_bytes
from neuclip_scale.planning.objective import NPN_SLOWER

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
H200 = GPU_TYPES["h200"]
OF_THE_RUN = ("parameters", "optimizer", "buffers", "pictures and tokens", "CUDA context", "allocator")
"""What `bench.py step` does not count as added, and the allowances."""


def result(name: str) -> Any:
    return json.loads((BENCHMARKS / f"{name}.json").read_bytes())


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("demo", {"data.num_streams": 1, "train.precision": "bf16", **overrides})


def test_sizes_are_the_kernels_own() -> None:
    from neuclip_scale.similarity import choosing

    assert (MIN_DIM, DIM_STEP) == (choosing._MIN_DIM, choosing._DIM_STEP)
    triton_npn = pytest.importorskip("neuclip_scale.normalizers.triton_npn")
    assert triton_npn.LIMITS.weight_bytes == NPN_BYTES
    assert triton_npn.WEIGH.n == triton_npn.PULL.m == triton_npn.PULL.n == BLOCK
    assert [dim for dim in (48, 64, 72, 512, 520) if by_triton(dim)] == [64, 512]
    assert not by_triton(512, "cpu")


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_the_npn_holds_what_it_was_seen_to_hold(precision: str) -> None:
    found = result("npn_h200")
    (row,) = (row for row in found["gpu"]["rows"] if row["contender"] == f"triton {precision}")
    m, b, d = found["options"]["num_prototypes"], found["options"]["batch_size"], found["embed_dim"]
    config = recipe(**{
        "train.matmul_precision": precision, "objective.npn.num_prototypes": m, "train.global_batch_size": b,
    })  # fmt: skip
    assert npn_bytes(config, config.objective.npn, b, d) / 2**20 == pytest.approx(row["npn_added_mib"], rel=0.01)


def test_exponentials_have_a_bound() -> None:
    """More anchors than 64 MiB have room for come in chunks; only what is m d and b d goes on growing."""
    config = recipe(**{"objective.npn.num_prototypes": 65536})
    sizes = [npn_bytes(config, config.objective.npn, b, 512) for b in (512, 1024, 1 << 20)]
    assert sizes[1] - sizes[0] == 2 * 2 * 512 * 512
    assert sizes[2] - sizes[1] == 2 * 2 * 512 * ((1 << 20) - 1024)


def test_similarities_hold_what_they_were_seen_to_hold() -> None:
    """Of features in bf16, which are not rounded again: the gradients [B, d] in fp32 and a chunk of weights."""
    found = result("kernels_h200")
    B, d = found["options"]["batch_size"], found["options"]["embed_dim"]
    _, weights = similarity_bytes(recipe(**{"train.global_batch_size": B}), B, B, d)
    (row,) = (row for row in found["rows"] if row["contender"] == "InfoNCE kernels")
    assert (weights + 2 * 4 * B * d) / 2**20 == pytest.approx(row["added_mib"], rel=0.01)


def test_tiles_are_of_other_widths_and_of_cpus() -> None:
    sizes = {"train.global_batch_size": 65536, "train.micro_batch_size": 8, "objective.name": "openclip"}
    plans = [plan_memory(recipe(**sizes, **{"objective.tile_size": tile}), 1) for tile in (512, 32768)]
    assert plans[0].items == plans[1].items
    on_cpu = plan_memory(recipe(**sizes), 1, device="cpu")
    assert "similarity tiles" in {item.name for item in on_cpu.items}
    assert "similarity tiles" not in {item.name for item in plans[0].items}


@pytest.mark.parametrize(
    ("name", "contender", "micro"),
    [
        ("step_b16_h200", "ours, openclip", 0),
        ("step_b16_h200", "ours, openclip, micro-batches", 128),
        ("step_b16_large_h200", "ours, openclip, micro-batches", 512),
        ("step_l14_h200", "ours, openclip", 0),
    ],
)
def test_a_step_adds_what_it_was_seen_to_add(name: str, contender: str, micro: int) -> None:
    """Peaks of torch's allocator above weights, optimizer and batch; towers that are not compiled, as in plans, and no
    activations kept."""
    found = result(name)
    (row,) = (row for row in found["rows"] if row["contender"] == contender)
    plan = plan_memory(
        recipe(**{
            "objective.name": "openclip", "train.max_grad_norm": 1.0, "model.preset": found["options"]["preset"],
            "train.global_batch_size": found["options"]["batch_size"], "train.micro_batch_size": micro,
            "train.kept_micro_batches": 0,
        }),
        1,
    )  # fmt: skip
    others = sum(item.device for item in plan.items if item.name in OF_THE_RUN and plan.moment in item.moments)
    assert (plan.device - others) / 2**20 == pytest.approx(row["added_mib"], rel=0.02)


def test_what_is_assumed_is_what_was_measured() -> None:
    """Shares of the peak, in the precision that recipes in bf16 have and in the others."""
    kernels, npn, peak = result("kernels_h200"), result("npn_h200")["gpu"], H200.peak("bf16")
    (loss,) = (row for row in kernels["rows"] if row["contender"] == "InfoNCE triton")
    B, d = kernels["options"]["batch_size"], kernels["options"]["embed_dim"]
    share = 4 * 2 * B**2 * d / (loss["milliseconds"] / 1000) / peak
    assert 0.9 * share < Assumptions().objective_compute < share
    rows = {row["contender"]: row["npn_ms"] / 1000 for row in npn["rows"]}
    assert Assumptions().npn_compute == pytest.approx(npn["npn_tflop"] * 1e12 / rows["triton medium"] / peak, rel=0.02)
    for precision, slower in NPN_SLOWER.items():
        assert slower == pytest.approx(rows[f"triton {precision}"] / rows["triton medium"], rel=0.02)
    assert Assumptions().npn_launch_us == pytest.approx(rows["triton medium"] / (2 * (4 * 10 + 2)) * 1e6, rel=0.02)


def test_the_objectives_seconds_by_hand() -> None:
    """NeuCLIP on one of 8 ranks: six products of 2 b B d, 42 of 2 b m d; few anchors are left to the host."""
    B, m, d, peak = 8 * 65536, 4096, 512, 989.5e12
    sizes = {"model.preset": "ViT-B-32", "objective.npn.num_prototypes": m, "data.num_streams": 8}
    place = Site(gpu=H200, world_size=8)
    similarities, npn = 6 * 2 * (B / 8) * B * d / (0.4 * peak), 42 * 2 * (B / 8) * m * d / (0.15 * peak)
    for precision, slower, npn_slower in (("medium", 1, 1.0), ("high", 2, 1.14), ("highest", 6, 2.3)):
        config = recipe(**sizes, **{"train.global_batch_size": B, "train.matmul_precision": precision})
        assert plan_time(config, place).objective == pytest.approx(slower * similarities + npn_slower * npn)
    few = plan_time(recipe(**sizes, **{"train.global_batch_size": 64}), place)
    assert few.objective == pytest.approx(84 * 58e-6, rel=1e-3)
    # fp32 recipes multiply in fp32 unless told otherwise.
    assert matmul_precision(load_recipe("demo", {}).train) == "highest"
    assert matmul_precision(recipe().train) == "medium"


def test_a_queue_is_multiplied_as_similarities_are_and_takes_no_tiles() -> None:
    """2 products of 2 B (M/W) (d + H) FLOPs beside the batch's own six of 2 b B d."""
    B, size, d, W = 4096, 65536, 512, 8
    sizes = {"model.preset": "ViT-B-32", "objective.name": "neuclip-queue", "objective.queue.size": size}
    config = recipe(**sizes, **{"train.global_batch_size": B, "data.num_streams": 8})
    H = math.ceil(math.log2(size / B)) + 1
    flops = 6 * 2 * (B / W) * B * d + 2 * 2 * B * (size / W) * (d + H)
    assert plan_time(config, Site(gpu=H200, world_size=W)).objective == pytest.approx(
        flops / (0.4 * 989.5e12), rel=0.01
    )
    items = {item.name: item.device for item in plan_memory(config, W).items}
    in_bf16 = 2 * 2 * size // W * d
    of_ages = 4 * 2 * size * H
    assert items["queue"] == pytest.approx(2 * in_bf16 + in_bf16 + 8 * size // W + of_ages, abs=1000)
    fp32 = recipe(**sizes, **{"train.global_batch_size": B, "data.num_streams": 8, "train.matmul_precision": "highest"})
    assert {item.name: item.device for item in plan_memory(fp32, W).items}["queue"] == items["queue"] - in_bf16


def test_sizes_of_the_queue_are_the_kernels_own() -> None:
    triton_queue = pytest.importorskip("neuclip_scale.normalizers.triton_queue")
    assert triton_queue.LIMITS.programs == kernels.QUEUE_PROGRAMS
    assert triton_queue._LEAST_PLACES == kernels.QUEUE_PLACES
    assert (triton_queue.STRIP.m, triton_queue.STRIP.n) == (BLOCK, BLOCK)


def test_what_torch_computes_goes_through_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities of a width that Triton does not take."""
    assume = Assumptions(operation_us=0.0)
    sizes = {"train.global_batch_size": 65536, "objective.name": "openclip"}
    monkeypatch.setattr(kernels, "DIM_STEP", 1000)
    slow, fast = (
        plan_time(
            recipe(**sizes),
            Site(gpu=GPU_TYPES[name], world_size=1, assume=assume),
        ).objective
        for name in ("h100", "h200")
    )
    assert slow / fast == pytest.approx(4.8 / 3.35, rel=0.05)
