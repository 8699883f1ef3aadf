"""Scaling over GPUs, engines, networks: invariants, stops by hand, the seconds of a plan of one site, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from neuclip_scale import cli
from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.planning import GPU_TYPES, Assumptions, Site, plan_memory, plan_time
from neuclip_scale.planning.scaling import Line, Point, ScalingPlan, plan_scaling
from neuclip_scale.planning.scaling_plot import draw, read_document
from neuclip_scale.planning.scaling_report import CAUSES, document, sentences, why
from neuclip_scale.planning.sweep import ENGINES, INTERCONNECTS, Sweep, with_interconnect
from neuclip_scale.planning.timing import StepTime

H100 = GPU_TYPES["h100"]
SIZES: dict[str, Any] = {"train.global_batch_size": 4096, "train.micro_batch_size": 64, "data.num_streams": 8}
PNG = b"\x89PNG\r\n\x1a\n"


def site(**changes: Any) -> Site:
    return Site(gpu=H100, world_size=8, **changes)


@pytest.fixture(scope="module")
def plan() -> ScalingPlan:
    return plan_scaling(load_recipe("demo", SIZES), site(), Sweep(gpus=(3, 8, 16, 64)))


def test_every_engine_network_and_regime_is_there(plan: ScalingPlan) -> None:
    names = {(line.regime, line.engine, line.interconnect) for line in plan.lines}
    assert names == {(r, e, i) for r in ("strong", "weak") for e in ENGINES for i in INTERCONNECTS}
    for line in plan.lines:
        assert [point.world_size for point in line.points] == (
            [8, 16, 64] if line.regime == "strong" else [3, 8, 16, 64]
        )
        assert line.efficiency(line.fitting[0]) == 1.0
        for point in line.points:
            assert point.global_batch_size == (4096 if line.regime == "strong" else 64 * point.world_size)
            assert point.rate * point.world_size == pytest.approx(point.global_batch_size / point.time.seconds)
            assert sum(point.parts().values()) == pytest.approx(point.time.seconds)


def test_numbers_that_do_not_divide_are_left_out_and_said(plan: ScalingPlan) -> None:
    assert plan.skipped == {"strong, 3 GPUs": "4,096 pairs do not divide over 3 GPUs"}
    assert "Left out: strong, 3 GPUs: 4,096 pairs do not divide over 3 GPUs." in list(sentences(plan))
    assert any("data.num_streams" in sentence for sentence in sentences(plan))


def test_a_point_is_the_plan_of_its_own_arguments(plan: ScalingPlan) -> None:
    """What it tells to add gives the same memory and seconds when it is planned alone."""
    for line in plan.lines:
        point = line.points[-1]
        config = load_recipe("demo", {**SIZES, **point.overrides})
        place = with_interconnect(site(), line.interconnect)
        place = dataclasses.replace(place, world_size=point.world_size, dataset_size=plan.site.dataset_size)
        assert plan_memory(config, point.world_size, place.dataset_size).device == point.memory
        assert plan_time(config, place).seconds == pytest.approx(point.time.seconds)


def test_networks_differ_between_nodes_alone(plan: ScalingPlan) -> None:
    times = {(line.regime, line.engine, line.interconnect, point.world_size): point.time.seconds
             for line in plan.lines for point in line.points}  # fmt: skip
    for engine in ENGINES:
        inside = {times["strong", engine, network, 8] for network in INTERCONNECTS}
        assert len(inside) == 1
        assert (
            times["strong", engine, "ndr", 16]
            < times["strong", engine, "hdr", 16]
            < times["strong", engine, "ethernet", 16]
        )


def test_without_a_network_or_a_host_nothing_is_lost() -> None:
    """Links of no latency and endless bandwidth: sharded arithmetic of a fixed batch scales exactly."""
    endless = dataclasses.replace(H100, nvlink=1e30, network=1e30)
    assume = Assumptions(latency_us=0.0, hop_us=0.0, network_hop_us=0.0, operation_us=0.0)
    config = load_recipe("demo", {**SIZES, "objective.name": "openclip", "train.micro_batch_size": 0})
    place = Site(gpu=endless, world_size=8, assume=assume)
    options = plan_scaling(config, place, Sweep(gpus=(8, 32, 128), engines=("fsdp2",), interconnects=("ndr",)))
    # The network is the sweep's own: its bytes are made free by NVLink's side only.
    strong = [dataclasses.replace(place, world_size=point.world_size) for point in options.lines[0].points]
    rates = [
        4096 / plan_time(load_recipe("demo", {**SIZES, **point.overrides, "objective.name": "openclip"}), each).seconds
        / point.world_size
        for each, point in zip(strong, options.lines[0].points)
    ]  # fmt: skip
    assert rates == pytest.approx([rates[0]] * 3, rel=1e-6)


def point(world_size: int, rate: float, problem: str = "", **waits: float) -> Point:
    """100 pairs on each GPU, at `rate` pairs a second."""
    seconds = 100 / rate
    encoders = seconds - sum(waits.values())
    time = StepTime(encoders, 0.0, 0.0, 0.0, sum(waits.values()), 0.0, 0.0, waits, 1, 1, 1, 0.3)
    return Point(world_size, 100 * world_size, 100, 100, 1, 2**30, problem, {}, time, ("a",))


def test_stops_by_hand() -> None:
    points = (
        point(8, 90.0),  # two micro-batches, say
        point(16, 100.0),
        point(32, 80.0, a=0.25),
        point(64, 79.9, a=100 / 79.9 - 1),
        point(128, 40.0, a=1.0, b=0.5),
        point(256, 5.0, "no room"),
    )
    line = Line("strong", "ddp", "ndr", points)
    assert line.best is points[1]
    assert [line.efficiency(each) for each in line.fitting] == pytest.approx([1, 10 / 9, 8 / 9, 79.9 / 90, 4 / 9])
    assert line.stop(0.8) is points[3]
    assert line.stop(0.5) is points[4]
    assert line.losses(points[4]) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert why(line) == "best at 16, below 80% from 64, below 50% from 128; at 64: 100% a (latency)"
    flat = Line("weak", "ddp", "ndr", (point(8, 100.0), point(16, 90.0, features=0.1)))
    assert why(flat) == f"best at 8, 90% at 16; at 16: 90% {CAUSES['features']}; 10% {CAUSES['encoders']}"
    assert "largest number" in why(Line("weak", "ddp", "ndr", (point(8, 90.0), point(16, 100.0))))
    assert why(Line("weak", "ddp", "ndr", points[-1:])) == "does not fit: no room"


def test_every_part_of_a_step_that_may_grow_has_words(plan: ScalingPlan) -> None:
    grown = {
        name for line in plan.lines for each in line.fitting for name, share in line.losses(each).items() if share > 0.1
    }
    assert grown <= set(CAUSES)


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        (Sweep(gpus=()), "--gpus"),
        (Sweep(gpus=(16, 8)), "rising"),
        (Sweep(gpus=(0, 8)), "--gpus"),
        (Sweep(engines=("zero4",)), "zero4"),
        (Sweep(engines=("ddp", "ddp")), "different names"),
        (Sweep(interconnects=()), "--interconnects"),
        (Sweep(interconnects=("roce",)), "Use ndr, hdr, ethernet"),
        (Sweep(pairs_per_gpu=-1), "--pairs-per-gpu"),
        (Sweep(gpus=(5,), engines=("ddp",), pairs_per_gpu=1), ""),
    ],
)
def test_what_cannot_be_planned_is_named(sweep: Sweep, told: str) -> None:
    if not told:  # a batch of 5 pairs is odd, but can be
        assert plan_scaling(load_recipe("demo", SIZES), site(), sweep).lines
        return
    with pytest.raises(ConfigError, match=told):
        plan_scaling(load_recipe("demo", SIZES), site(), sweep)


COMMAND = ["plan", "demo", "--scaling", "train.global_batch_size=4096", "--gpus", "8", "16",
           "--engines", "ddp", "zero3", "--interconnects", "hdr"]  # fmt: skip


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other, picture = tmp_path / "plan.json", tmp_path / "other.json", tmp_path / "new" / "plan.png"
    assert cli.main([*COMMAND, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "strong scaling (4,096 pairs a step)" in printed
    assert "8 x 200 Gb/s InfiniBand a node" in printed  # four lines: every point is told
    assert "nothing was measured on these GPUs" in printed
    written = json.loads(path.read_bytes())
    assert [(each["regime"], each["engine"]) for each in written["lines"]] == [
        (regime, engine) for regime in ("strong", "weak") for engine in ("ddp", "zero3")
    ]
    assert written["what"].startswith("calculated")
    assert written["lines"][0]["points"][0]["efficiency"] == 1.0
    path.rename(other)
    assert cli.main([*COMMAND, "--json", str(path), "--plot", str(picture), "--beside", str(other)]) == 0
    assert picture.read_bytes().startswith(PNG)
    assert draw([read_document(path)]).startswith(PNG)


def test_nothing_fits_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for each of 10^12 pairs."""
    table = ["objective.name=fastclip-v3", "--dataset-size", "1000000000000"]
    options = ["--engines", "ddp", "--interconnects", "ndr", "--gpus", "8"]
    assert cli.main(["plan", "demo", "--scaling", *table, *options]) == 1
    output = capsys.readouterr()
    assert "no room" in output.out
    assert "error: demo fits on none of these" in output.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--plot", "p.png"], "--plot"),
        (["--gpus", "8"], "--gpus"),
        (["--scaling", "--beside", "p.json"], "--plot FILE"),
        (["--scaling", "--price", "2"], "--price = '2.0': is of one site alone"),
        (["--scaling", "--no-alternatives"], "--no-alternatives"),
        (["--price", "-2"], "--price = -2.0: is no price"),
        (["--egress-price", "nan"], "--egress-price = nan: is no price"),
        (
            ["--scaling", "--gpus", "7", "train.global_batch_size=64", "--pairs-per-gpu", "0", "--engines", "x"],
            "--engines",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "demo", *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"lines": 3, "recipe": "r"}',
        b'{"lines": [{"regime": "weak"}], "recipe": "r"}',
        b'{"recipe": "r", "lines": [{"regime": "weak", "engine": [], "interconnect": "n", "points": []}]}',
        b'{"recipe": "r", "lines": [{"regime": "weak", "engine": "e", "interconnect": "n", "points": '
        b'[{"gpus": 8, "pairs_per_second": -1, "problem": ""}]}]}',
    ],
)
def test_a_hostile_plan_beside_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="--beside"):
        read_document(path)


def test_the_documents_words_are_the_plans(plan: ScalingPlan) -> None:
    written = document(plan)
    assert written["words"] == list(sentences(plan))
    assert json.loads(json.dumps(written)) == written | {"sweep": json.loads(json.dumps(written["sweep"]))}
    first = written["lines"][0]["points"][0]
    assert first["memory_gib"] == pytest.approx(plan.lines[0].points[0].memory / 2**30, rel=1e-3)
