"""A step's timeline: the scheduler against a slow reference and bounds, and engines' orders by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.grad_cache import KeptActivations
from neuclip_scale.planning import GPU_TYPES, Site, plan_traffic
from neuclip_scale.planning.links import link_time
from neuclip_scale.planning.schedule import Schedule, Task, run
from neuclip_scale.planning.timeline import GRADIENTS, Work, step_tasks
from neuclip_scale.planning.units import encoder_units
from neuclip_scale.telemetry.flops import count_encoder_flops

ZERO = {"engine.name": "deepspeed", "data.num_streams": 16}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"engine.name": "ddp"},
    "fsdp2": {"engine.name": "fsdp2"},
    "kept": {"engine.name": "fsdp2", "engine.fsdp.reshard_after_forward": False},
    "accumulated": {"engine.name": "fsdp2", "engine.fsdp.accumulate_sharded": True},
    "hybrid": {"engine.name": "fsdp2", "engine.fsdp.replicas": 2},
    **{f"zero{stage}": {**ZERO, "engine.deepspeed.config": f"zero{stage}"} for stage in range(4)},
}
WORK = Work(forward=0.01, backward=0.02, objective=0.005, update=0.001, num_micro=1)


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("demo", {"data.num_streams": 16, "train.precision": "bf16", **overrides})


def site(world_size: int = 16, **links: float) -> Site:
    return Site(gpu=dataclasses.replace(GPU_TYPES["h100"], **links), world_size=world_size)


def played(config: Recipe, place: Site, work: Work = WORK) -> tuple[Schedule, list[Task]]:
    tasks = step_tasks(config, place, plan_traffic(config, place.world_size), work)
    return run(tasks), tasks


def longest_path(tasks: list[Task]) -> float:
    """When the last task ends: every chain of needs and queues, to a fixed point."""
    before: list[list[int]] = []
    for place, task in enumerate(tasks):
        same = [k for k in range(place) if bool(tasks[k].sends) == bool(task.sends)]
        before.append([*task.needs, *same])
    ends = [0.0] * len(tasks)
    while True:
        again = [max((ends[k] for k in before[i]), default=0.0) + tasks[i].seconds for i in range(len(tasks))]
        if again == ends:
            return max(ends, default=0.0)
        ends = again


@st.composite
def any_tasks(draw: st.DrawFn) -> list[Task]:
    tasks: list[Task] = []
    for place in range(draw(st.integers(0, 14))):
        needs = draw(st.sets(st.integers(0, place - 1), max_size=3)) if place else set()
        seconds = draw(st.integers(0, 9))
        tasks.append(Task(float(seconds), tuple(sorted(needs)), draw(st.sampled_from(["", "a", "b"]))))
    return tasks


@given(any_tasks())
def test_the_scheduler_is_the_longest_path_and_every_wait_has_a_name(tasks: list[Task]) -> None:
    found = run(tasks)
    assert found.seconds == longest_path(tasks)
    computing = sum(task.seconds for task in tasks if not task.sends)
    sending = {name: sum(task.seconds for task in tasks if task.sends == name) for name in ("a", "b")}
    assert found.computing == computing
    assert found.computing + sum(found.waits.values()) == found.seconds
    assert max(0.0, sum(sending.values()) - computing) <= sum(found.waits.values()) <= sum(sending.values())
    assert all(0 < seconds <= sending[name] for name, seconds in found.waits.items())


def test_a_timeline_by_hand() -> None:
    """Three blocks of backward of 2 s, each gradient travels 3 s: 2 + 3 x 3 = 11 s, of which 5 s are waited for; an
    update after that; a collective that waits holds up everything.
    """
    blocks = [Task(2.0), Task(3.0, (0,), "g"), Task(2.0), Task(3.0, (2,), "g"), Task(2.0), Task(3.0, (4,), "g")]
    found = run([*blocks, Task(1.0, (5,)), Task(4.0, (6,), "norm"), Task(1.0, (7,))])
    assert found == Schedule(seconds=17.0, computing=8.0, waits={"g": 5.0, "norm": 4.0})
    # Fast enough, only the last one's is left over.
    assert run([*(Task(2.0, (), ""),), Task(1.0, (0,), "g"), Task(2.0), Task(1.0, (2,), "g")]).waits == {"g": 1.0}


@pytest.mark.parametrize("num_micro", [1, 3])
@pytest.mark.parametrize("name", sorted(WAYS))
def test_nothing_is_lost_between_traffic_and_timeline(name: str, num_micro: int) -> None:
    """What is sent takes as long as all of the plan's collectives, what is computed as long as the work."""
    sizes = {"train.global_batch_size": 48 * 16, "train.micro_batch_size": 48 // num_micro}
    config, place = recipe(**WAYS[name], **sizes), site(network=2e8)
    work = dataclasses.replace(WORK, num_micro=num_micro)
    found, tasks = played(config, place, work)
    for transfer in plan_traffic(config, 16):
        sent = sum(task.seconds for task in tasks if task.sends == transfer.name)
        assert sent == pytest.approx(link_time(transfer, place).seconds), transfer.name
    assert found.computing == pytest.approx(work.seconds)
    encoders = (2 if num_micro > 1 else 1) * num_micro * 0.01 + num_micro * 0.02
    assert work.encoders == pytest.approx(encoders)
    assert all(need < place for place, task in enumerate(tasks) for need in task.needs)


@pytest.mark.parametrize(("kept", "again"), [((0, "image"), 3 * 0.4), ((2, ""), 1.0), ((1, "text"), 2 * 0.6)])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_what_is_kept_is_not_encoded_again(name: str, kept: tuple[int, Any], again: float) -> None:
    """`again` in forward passes of a micro-batch, of which pictures are six tenths."""
    sizes = {"train.global_batch_size": 48 * 16, "train.micro_batch_size": 16}
    fields = {"train.kept_micro_batches": kept[0], "train.kept_tower": kept[1]}
    config, place = recipe(**WAYS[name], **sizes, **fields), site(network=2e8)
    work = dataclasses.replace(WORK, num_micro=3, kept=KeptActivations.of(config.train, 3), image_share=0.6)
    found, tasks = played(config, place, work)
    assert work.encoders == pytest.approx(3 * 0.03 + again * 0.01)
    assert found.computing == pytest.approx(work.seconds)
    for transfer in plan_traffic(config, 16):
        sent = sum(task.seconds for task in tasks if task.sends == transfer.name)
        assert sent == pytest.approx(link_time(transfer, place).seconds), transfer.name


def test_features_travel_while_the_next_micro_batch_is_encoded() -> None:
    sizes = {"train.global_batch_size": 48 * 16, "train.micro_batch_size": 16}
    config, place = recipe(**WAYS["ddp"], **sizes), site()
    work = dataclasses.replace(WORK, num_micro=3)
    found, tasks = played(config, place, work)
    assert sum(task.sends == "features, early" for task in tasks) == 4
    assert "features, early" not in found.waits
    assert found.waits["features"] == pytest.approx(
        next(task.seconds for task in tasks if task.sends == "features"),
    )


def exposed(found: Schedule) -> float:
    return sum(found.waits.get(name, 0.0) for name in GRADIENTS)


def test_a_bucket_larger_than_the_model_hides_nothing() -> None:
    """ZeRO's reduce_bucket_size of 500,000,000 waits for the last gradient; DDP's buckets travel before; ZeRO 0, which
    reduces after the backward pass, hides nothing either.
    """
    place, shares = site(), {}
    for name in ("ddp", "zero0", "zero1", "zero2"):
        config = recipe(**WAYS[name])
        found, _ = played(config, place)
        whole = sum(link_time(each, place).seconds for each in plan_traffic(config, 16) if each.name in GRADIENTS)
        shares[name] = exposed(found) / whole
    assert [shares[name] for name in ("zero0", "zero1", "zero2")] == pytest.approx([1.0] * 3)
    assert shares["ddp"] < 0.9


def test_ddp_waits_for_its_last_bucket_alone_where_the_network_is_fast() -> None:
    config, place = recipe(**{"model.preset": "ViT-B-16"}), site()
    found, tasks = played(config, place, dataclasses.replace(WORK, backward=10.0))
    pieces = [task.seconds for task in tasks if task.sends == "gradients"]
    assert len(pieces) > 10
    assert exposed(found) == pytest.approx(pieces[-1])


def test_fsdp2_fetches_one_block_ahead() -> None:
    """With gatherings far shorter than blocks only the first is waited for in each pass; with far longer ones all."""
    config, blocks = recipe(**WAYS["fsdp2"], **{"model.preset": "ViT-B-16"}), 24
    fast, tasks = played(config, site(network=1e12, nvlink=1e12), Work(10.0, 20.0, 0.0, 0.0, 1))
    pieces = [task.seconds for task in tasks if task.sends == "parameters, forward"]
    assert len(pieces) == blocks + 1
    # The root's, and the first block's behind it: the root's own pass (pictures into patches) needs the root alone.
    assert fast.waits["parameters, forward"] == pytest.approx(pieces[0])
    slow, tasks = played(config, site(network=1e8, nvlink=1e8), Work(0.001, 0.002, 0.0, 0.0, 1))
    whole = sum(task.seconds for task in tasks if task.sends == "parameters, forward")
    assert whole - 0.001 <= slow.waits["parameters, forward"] <= whole


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hybrid", "zero1", "zero3"])
def test_a_faster_network_is_never_slower(name: str) -> None:
    config = recipe(**WAYS[name])
    times = [played(config, site(network=speed))[0].seconds for speed in (1e7, 1e8, 1e9, 5e10)]
    assert times == sorted(times, reverse=True)
    assert times[-1] >= WORK.seconds


def test_units_are_the_model() -> None:
    config = recipe(**{"model.preset": "ViT-B-32"})
    units = encoder_units(config.model)
    assert [unit.is_block for unit in units] == [False, *[True] * 12, False, *[True] * 12]
    assert sum(unit.forward for unit in units) == pytest.approx(1.0)
    from neuclip_scale.planning.sharding import planned

    model = planned(config.model, False)
    assert sum(unit.size for unit in units) == sum(p.numel() for p in model.parameters())
    # A block's share: 2 FLOPs for each parameter of its products and position, and attention's two products.
    n, d = 50, 768
    block = 2 * n * 12 * d * d + 4 * n * n * d
    assert units[1].forward * count_encoder_flops(model).forward == pytest.approx(block, rel=1e-3)


def test_a_ring_of_many_ranks_takes_a_hop_for_each() -> None:
    config = recipe(**{"data.num_streams": 1024, "train.global_batch_size": 8192})
    features = next(each for each in plan_traffic(config, 1024) if each.name == "features")
    place = site(1024)
    hops = (1023 - 127) * 1.9e-6 + 127 * 4e-6
    assert link_time(features, place).latency == pytest.approx(2 * (15e-6 + hops))
    numbers = next(each for each in plan_traffic(config, 1024) if each.kind == "all_reduce")
    assert link_time(numbers, place).latency == pytest.approx(numbers.calls * 15e-6 * math.log2(1024))
