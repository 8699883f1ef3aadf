"""That what is measured is what the benchmarks say: memory, precision, failures, clocks."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(TOOLS))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("contender", ["open_clip", "ours, openclip"])
def test_a_measured_step_begins_without_gradients(
    contender: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """open_clip leaves a step's until the next one, which would begin with them and not add them."""
    import bench_step
    import bench_turns

    seen = []

    def steps(*_: Any, **__: Any) -> Iterator[Any]:
        model = torch.nn.Linear(2, 2)
        while True:
            seen.append([each.grad is None for each in model.parameters()])
            model(torch.ones(1, 2)).sum().backward()
            yield tuple(model.parameters())

    monkeypatch.setattr(bench_step, "open_clip_steps", steps)
    monkeypatch.setattr(bench_step, "our_steps", steps)
    monkeypatch.setattr(bench_turns, "matmul_flops", lambda dtype: {"bfloat16": 2.0, "float32": 1.0}[dtype])
    small: dict[str, Any] = {"preset": "toy", "batch_size": 4, "steps": 1, "threads": torch.get_num_threads()}
    bounds = []
    for precision in ("fp32", "bf16"):
        seen.clear()
        bench_step.child(bench_step.Step(**small, precision=precision), contender)
        assert seen == [[True, True], [True, True]]
        bounds.append(json.loads(capsys.readouterr().out)["bound_seconds"])
    assert bounds[0] == 2 * bounds[1], "a bound is of products in the step's own precision"


def test_the_steps_yield_the_parameters_that_they_train() -> None:
    import bench_step

    options = bench_step.Step(preset="toy", batch_size=4, steps=1)
    steps = bench_step.open_clip_steps(options, 1)
    parameters = next(steps)
    assert any(each.grad is not None for each in parameters), "open_clip's trainer frees gradients by now"
    bench_step.free_gradients(parameters)
    assert all(each.grad is None for each in parameters)


def test_the_size_of_the_npn_is_told_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_step

    monkeypatch.setattr(bench_step.bench_turns, "by_turns", lambda *_: {})
    assert bench_step.measure(bench_step.Step())["num_prototypes"] == 1024


def test_contenders_on_a_gpu_keep_their_precision_and_their_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step runs with the precision that its contender set, and one that runs out of memory is listed."""
    import bench_step
    import bench_step_gpu

    from neuclip_scale.telemetry import devices

    parameter = torch.nn.Parameter(torch.zeros(1))
    seen: dict[str, list[str]] = {}

    def steps(name: str, precision: str = "", fails_at: int = 99) -> Iterator[Any]:
        torch.set_float32_matmul_precision(precision or torch.get_float32_matmul_precision())
        for number in range(99):
            if number == fails_at:
                raise torch.cuda.OutOfMemoryError("no more\nat all")
            seen.setdefault(name, []).append(torch.get_float32_matmul_precision())
            assert parameter.grad is None or number < 2
            parameter.grad = torch.ones(1)
            yield (parameter,)

    def ours(options: Any, parts: int, name: str, folder: Path, *, compiled: bool) -> Iterator[Any]:
        assert name in ("ours, openclip", "ours, neuclip")
        return steps(name, "highest", 3 if name == "ours, neuclip" else 99)

    monkeypatch.setattr(bench_step, "open_clip_steps", lambda *_, compiled: steps("open_clip"))
    monkeypatch.setattr(bench_step, "our_steps", ours)
    monkeypatch.setattr(devices, "peak_flops", lambda name, kind: {"fp32": 1e9, "tf32": 8e9, "bf16": 16e9}[kind])
    contenders = ("open_clip", "ours, openclip", "ours, neuclip")
    options = bench_step.Step(preset="toy", batch_size=4, repeats=2, contenders=contenders)
    result = bench_step_gpu.measure(options)
    assert seen["open_clip"] == ["high"] * 4
    assert seen["ours, openclip"] == ["highest"] * 4
    assert result["failures"] == {"ours, neuclip": "out of memory: no more"}
    peer, row = result["rows"]
    assert (peer["contender"], row["contender"]) == contenders[:2]
    assert (peer["matmul_precision"], row["matmul_precision"]) == ("high", "highest")
    assert row["bound_seconds"] == 8 * peer["bound_seconds"], "open_clip multiplies in TF32"
    assert peer["whole_mib"] >= peer["added_mib"]
    bench_step_gpu.show(options, result)


def test_time_of_other_processes_is_read_finely() -> None:
    import bench_loader

    before = bench_loader._core_seconds()
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy:
        time.sleep(0.1)
        running = bench_loader._core_seconds()
        busy.kill()
    assert before < running <= bench_loader._core_seconds()


def test_there_is_a_shard_for_each_worker(tmp_path: Path) -> None:
    import bench_loader

    from neuclip_scale.data.shards import index_shard

    bench_loader.write_shards(tmp_path, 10, 4)
    sizes = [index_shard(path).num_samples for path in sorted(tmp_path.glob("*.tar"))]
    assert (sum(sizes), len(sizes), min(sizes)) == (10, 4, 2)


def test_what_workers_had_ready_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_loader

    taken = iter(range(1000))
    monkeypatch.setattr(bench_loader, "_contender", lambda *_: taken)
    bench_loader.child(bench_loader.Loader(num_workers=2, num_batches=2), "bound: turbo decode", tmp_path)
    assert next(taken) == 3 * 2 + 2
    assert json.loads(capsys.readouterr().out)["per_core_second"] > 0


def test_small_batches_and_every_loss_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_loss

    for contender in ("openclip", "rgcl-g", bench_loss.SIGLIP_CHUNKS):
        options = bench_loss.Loss(batch_size=16, embed_dim=8, threads=torch.get_num_threads())
        bench_loss.child(options, contender)
        assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_large_samples_are_resharded(tmp_path: Path) -> None:
    import bench_reshard

    bench_reshard.make_pool(bench_reshard.Reshard(samples=3, sample_bytes=800_000, keep=1.0), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("pool/*.tar")) > 3 * 0.6 * 800_000
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="keeps none of --samples 3"):
        bench_reshard.make_pool(bench_reshard.Reshard(samples=3, keep=1e-9), tmp_path / "none")


def test_resharding_is_compared_within_a_round() -> None:
    import bench_reshard

    seconds = {"ours, everything": (2, 4), "tarfile, everything": (4, 16), "copy and compare": (1, 1)}
    runs = {name: [{"work_cpu_seconds": float(each)} for each in both] for name, both in seconds.items()}
    row = bench_reshard._compared("ours, everything", runs)
    assert (row["peer"], row["time_ratio"], row["share_of_bound"]) == ("tarfile, everything", 0.375, 0.375)
    assert bench_reshard._compared("copy and compare", runs) == {}


def test_bounds_of_the_npn_are_of_the_device_or_none() -> None:
    import bench_npn_gpu

    unknown = torch.device("cpu")
    assert bench_npn_gpu.peak_tflops(SimpleNamespace(peak_tflops=0.0), unknown) is None
    assert bench_npn_gpu.peak_tflops(SimpleNamespace(peak_tflops=312.0), unknown) == 312.0
    assert bench_npn_gpu.products_bound("triton high", 312e9, 312.0) == 2.0
    assert bench_npn_gpu.against(bench_npn_gpu.products_bound("triton high", 1.0, None), 5.0) == {}
