"""Speeds out of real results: benchmarks' JSON and a run's summary, round trips of seconds, hostile files."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from neuclip_scale import Trainer, cli
from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.planning import GPU_TYPES, Assumptions, Site, plan_time
from neuclip_scale.planning.measured import read_measured
from neuclip_scale.planning.sharding import model_sizes

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks"


def site(**changes: Any) -> Site:
    assume = Assumptions(operation_us=0.0, npn_launch_us=0.0)
    return Site(gpu=GPU_TYPES["h200"], world_size=1, assume=assume, **changes)


def test_a_run_planned_from_its_own_summary_takes_its_own_seconds(folder: str, tmp_path: Path) -> None:
    config = load_recipe("demo", {
        "run_dir": str(tmp_path / "run"), "data.train": f"{folder}/shards", "data.num_workers": 0,
        "data.num_streams": 1, "evaluation.data": "", "evaluation.normalizer_every_steps": 0, "engine.device": "cpu",
        "train.global_batch_size": 16, "train.micro_batch_size": 8, "train.num_steps": 3,
        "objective.npn.num_prototypes": 32,
    })  # fmt: skip
    summary = Trainer(config).fit()
    path = tmp_path / "run" / "summary.json"
    measured = read_measured([path])
    time = plan_time(config, site(measured=measured))
    spent = {name: each["seconds"] for name, each in summary["cost"]["sections"].items()}
    spent_on_encoders = spent["encode"] + spent["replay"] + spent["backward"]
    assert time.encoders * 3 == pytest.approx(spent_on_encoders, rel=0.01)  # attention's squares are not measured
    assert 8 <= summary["cost"]["packed_tokens"] == measured.caption_tokens < 16
    of_objective = [name for name in spent if name.startswith(("objective", "npn/", "similarities/", "normalizers/"))]
    assert time.objective * 3 == pytest.approx(sum(spent[name] for name in of_objective), rel=0.01)
    assert str(path) in measured.told[0]
    assert "1 x cpu" in measured.told[0]
    # The update was not measured as such: it stays assumed.
    assert time.update == plan_time(config, site()).update


def test_the_npn_benchmark_gives_all_parts() -> None:
    path = BENCHMARKS / "npn_share.json"
    parts = json.loads(path.read_bytes())["measured"]["parts"]
    config = load_recipe("demo", {
        "model.preset": "ViT-B-32", "objective.name": "neuclip", "objective.npn.num_prototypes": 4096,
        "objective.npn.updates_per_step": 10, "train.global_batch_size": 4096, "data.num_streams": 1,
    })  # fmt: skip
    time = plan_time(config, site(measured=read_measured([path])))
    assert time.encoders == pytest.approx(parts["encoders"]["seconds"])
    assert time.update == pytest.approx(parts["optimizer"]["seconds"])
    objective = sum(each["seconds"] for name, each in parts.items() if name.startswith(("npn/", "sim", "objective")))
    assert time.objective == pytest.approx(objective, rel=0.01)


def test_losses_and_steps_give_one_speed_each() -> None:
    loss, step = BENCHMARKS / "loss_cpu.json", BENCHMARKS / "step_cpu.json"
    rows = {row["contender"]: row["cpu_seconds"] for row in json.loads(loss.read_bytes())["rows"]}
    both = read_measured([loss, step])
    assert both.update is None
    assert len(both.told) == 2
    assert both.objective is not None
    # 40 products of 2 B m d in the updates, 4 of 2 B^2 d and one of 2 B m d in each direction's prediction.
    flops = (40 * 4096 + 4 * 8192 + 2 * 4096) * 2 * 8192 * 512
    assert both.objective == pytest.approx(flops / rows["neuclip"], rel=0.05)
    config = load_recipe("demo", {"train.global_batch_size": 512, "data.num_streams": 1})
    ours = {row["contender"]: row["cpu_seconds"] for row in json.loads(step.read_bytes())["rows"]}["ours, openclip"]
    assert plan_time(config, site(measured=both)).encoders == pytest.approx(ours)


@pytest.mark.parametrize(
    ("name", "overrides", "row"),
    [
        ("step_b16_h200", {"model.preset": "ViT-B-16"}, "ours, openclip, compiled"),
        ("step_l14_h200", {"model.preset": "ViT-L-14"}, "ours, openclip, compiled"),
        ("step_b16_h200", {"model.preset": "ViT-B-16"}, "ours, openclip"),
        (
            "step_l14_checkpointed_h200",
            {"model.preset": "ViT-L-14", "model.grad_checkpointing": True},
            "ours, openclip, checkpointed, compiled",
        ),
    ],
)
def test_a_step_on_a_gpu_gives_the_encoders_of_its_own_size(
    name: str, overrides: dict[str, Any], row: str, tmp_path: Path
) -> None:
    document = json.loads((BENCHMARKS / f"{name}.json").read_bytes())
    kept = [each for each in document["rows"] if row.endswith("compiled") or "compiled" not in each["contender"]]
    path = tmp_path / "step.json"
    path.write_text(json.dumps({**document, "rows": kept}))
    measured = read_measured([path])
    sizes = {"train.global_batch_size": document["options"]["batch_size"], "data.num_streams": 1}
    config = load_recipe("demo", {"train.precision": "bf16", **sizes, **overrides})
    (seconds,) = (each["seconds"] for each in kept if each["contender"] == row)
    assert plan_time(config, site(measured=measured)).encoders == pytest.approx(seconds)
    assert (measured.objective, measured.normalizer, measured.update) == (None, None, None)
    assert "NVIDIA H200" in measured.told[0]
    assert ("compiled" in measured.told[0]) == row.endswith("compiled")


def test_the_npn_on_a_gpu_has_a_speed_of_its_own() -> None:
    npn, kernels = BENCHMARKS / "npn_h200.json", BENCHMARKS / "kernels_h200.json"
    document = json.loads(npn.read_bytes())
    rows = {row["contender"]: row["npn_ms"] / 1000 for row in document["gpu"]["rows"]}
    config = load_recipe("demo", {
        "model.preset": "ViT-B-32", "objective.npn.num_prototypes": 4096, "objective.npn.updates_per_step": 10,
        "train.global_batch_size": 4096, "data.num_streams": 1, "train.precision": "bf16",
    })  # fmt: skip
    measured = read_measured([npn, kernels])
    time = plan_time(config, site(measured=measured))
    (loss,) = (row for row in json.loads(kernels.read_bytes())["rows"] if row["contender"] == "InfoNCE triton")
    # Of B = 65,536 pairs; similarities grow with the square.
    assert time.objective == pytest.approx(rows["triton medium"] + loss["milliseconds"] / 1000 / 256)
    assert time.update == pytest.approx(document["gpu"]["shared_ms"]["optimizer"] / 1000)
    assert measured.encoders is None
    assert "triton medium with B = 4,096" in measured.told[0]
    # Losses alone say nothing of the NPN, which stays assumed.
    assumed = plan_time(config, site()).objective - plan_time(config, site(measured=read_measured([kernels]))).objective
    assert abs(assumed) < 0.1 * rows["triton medium"]


def test_a_measured_update_is_not_that_of_an_optimizer_on_the_host() -> None:
    measured = site(measured=read_measured([BENCHMARKS / "npn_h200.json"]))
    zero = {"engine.name": "deepspeed", "model.preset": "ViT-B-32"}
    on_host = load_recipe("datacomp_small", zero | {"engine.deepspeed.config": "zero2_offload"})
    on_gpu = load_recipe("datacomp_small", zero | {"engine.deepspeed.config": "zero2"})
    assert plan_time(on_host, measured).update == plan_time(on_host, site()).update
    assert plan_time(on_host, measured).update > 10 * plan_time(on_gpu, measured).update


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_a_measured_npn_is_slower_in_more_digits(precision: str) -> None:
    """The file has all three; its bf16 is taken, and what was measured once of the others' slowness."""
    path = BENCHMARKS / "npn_h200.json"
    rows = {row["contender"]: row["npn_ms"] for row in json.loads(path.read_bytes())["gpu"]["rows"]}
    found = {
        name: plan_time(
            load_recipe("datacomp_small", {"objective.name": "neuclip", "train.matmul_precision": name}),
            site(measured=dataclasses.replace(read_measured([path]), objective=1e30)),
        ).objective
        for name in ("medium", precision)
    }
    expected = rows[f"triton {precision}"] / rows["triton medium"]
    assert found[precision] / found["medium"] == pytest.approx(expected, rel=0.05)


def test_what_has_everything_together_gives_one_speed_for_all() -> None:
    share, loss, kernels = (BENCHMARKS / f"{name}.json" for name in ("npn_share", "loss_cpu", "kernels_h200"))
    for path in (share, loss):
        assert read_measured([path]).normalizer == read_measured([path]).objective
        assert read_measured([kernels, path]).objective != read_measured([kernels, path]).normalizer
    gpu = BENCHMARKS / "npn_h200.json"
    assert read_measured([share, gpu]).normalizer == read_measured([share]).normalizer


@pytest.mark.parametrize(("section", "normalizer"), [("npn/update", 500.0), ("normalizers/table", None)])
def test_a_run_without_an_npn_says_nothing_of_it(section: str, normalizer: float | None, tmp_path: Path) -> None:
    sections = {name: {"seconds": 1.0} for name in ("encode", "backward", "objective", section)}
    cost = {"sections": sections, "hardware_flops": 4000, "objective_flops": 2000}
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"cost": cost, "samples_seen": 1, "world_size": 2, "recipe": "r", "device": "d"}))
    measured = read_measured([path])
    assert (measured.encoders, measured.objective, measured.normalizer) == (1000.0, 500.0, normalizer)


def test_kernels_give_the_objectives_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_kernels

    options = bench_kernels.Kernels(
        batch_size=96, embed_dim=32, dtype="float32", repeats=1, contenders=("torch",), forms=("margin",), device="cpu"
    )
    result = {"options": dataclasses.asdict(options), **bench_kernels.measure(options)}
    sys.modules.pop("bench_kernels")
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(result))
    measured = read_measured([path])
    assert measured.encoders is None
    assert measured.objective is not None
    (row,) = result["rows"]
    assert measured.objective * row["milliseconds"] / 1000 == pytest.approx(4 * 2 * 96**2 * 32, rel=0.2)
    assert "fastclip-v3 with B = 96" in measured.told[0]


def test_the_first_file_counts() -> None:
    npn, loss = BENCHMARKS / "npn_share.json", BENCHMARKS / "loss_cpu.json"
    assert read_measured([loss, npn]).objective == read_measured([loss]).objective
    assert read_measured([loss, npn]).encoders == read_measured([npn]).encoders
    sizes = model_sizes(load_recipe("demo", {"model.preset": "ViT-B-32"}))
    seconds = json.loads(npn.read_bytes())["measured"]["parts"]["optimizer"]["seconds"]
    assert read_measured([npn]).update == pytest.approx(seconds / sizes.trained)


NPN = json.loads((BENCHMARKS / "npn_share.json").read_bytes())
NPN_ON_GPU = json.loads((BENCHMARKS / "npn_h200.json").read_bytes())
STEP_ON_GPU = json.loads((BENCHMARKS / "step_b16_h200.json").read_bytes())
LOSS = json.loads((BENCHMARKS / "loss_cpu.json").read_bytes())


def changed(document: Any, path: str, value: Any) -> Any:
    first, _, rest = path.partition(".")
    return {**document, first: changed(document[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ([], "no result"),
        ({"rows": []}, "no result"),
        ({"cost": {}, "samples_seen": 1}, "has no world_size"),
        ({"cost": [], "samples_seen": 1, "world_size": 1}, "has no cost.sections"),
        ({"cost": {"sections": {}}, "samples_seen": 1, "world_size": 1}, "no time of encode"),
        (changed(NPN, "measured.parts.encoders.seconds", 0), "measured.parts.encoders.seconds is 0"),
        (changed(NPN, "measured.parts.encoders.seconds", float("nan")), "is nan"),
        (changed(NPN, "measured.parts.optimizer.seconds", "1"), "is '1'"),
        (changed(NPN, "measured.parts.optimizer.seconds", True), "is True"),
        (changed(NPN, "by_flops.npn.flops", -1), "by_flops.npn.flops is -1"),
        (changed(NPN, "options.preset", "ViT-Z"), "'ViT-Z' is no preset"),
        (changed(NPN, "measured", {}), "has no measured.parts"),
        (
            changed(NPN, "measured.parts", {"encoders": {"seconds": 1}, "optimizer": {"seconds": 1}}),
            "no time of objective",
        ),
        (changed(NPN_ON_GPU, "gpu.rows", []), "has no row of 'triton medium'"),
        (changed(NPN_ON_GPU, "gpu.rows", [{"contender": "torch high"}]), "has no gpu.rows.npn_ms"),
        (changed(NPN_ON_GPU, "gpu.shared_ms.optimizer", -1), "gpu.shared_ms.optimizer is -1"),
        (changed(NPN_ON_GPU, "gpu.shared_ms", 3), "has no gpu.shared_ms.optimizer"),
        (changed(NPN_ON_GPU, "gpu", {"needs": "a GPU"}), "has no measured.parts"),
        (changed(STEP_ON_GPU, "rows", []), "has no row of 'ours, openclip, compiled'"),
        (changed(STEP_ON_GPU, "rows", [{"contender": "ours, openclip", "cpu_seconds": 1}]), "has no rows.seconds"),
        (changed(STEP_ON_GPU, "options.preset", "ViT-Z"), "'ViT-Z' is no preset"),
        (changed(LOSS, "rows", 3), "has no row of"),
        (changed(LOSS, "rows", [{"contender": "neuclip"}]), "has no rows.cpu_seconds"),
        (changed(LOSS, "options.batch_size", 1e300), "not a whole number"),
        (changed(LOSS, "options.embed_dim", 2.5), "not a whole number"),
    ],
)
def test_a_file_that_tells_nothing_is_named(document: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="--measured") as error:
        read_measured([path])
    assert str(path) in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_measured([path])


def test_the_plan_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(BENCHMARKS / "npn_share.json")
    options = ["plan", "demo", "--world-size", "4", "--no-alternatives", "--measured", file]
    assert cli.main(options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Measured: encoders, objective and update:" in printed
    assert "npn_share.json" in printed
    assert cli.main([*options[:2], "--scaling", "--engines", "ddp", "--gpus", "1", "2", "--measured", file]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "npn_share.json, ViT-B-32 on" in printed
    assert "nothing was measured" not in printed
