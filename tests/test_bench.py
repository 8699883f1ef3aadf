"""The benchmarks run and tell of every contender; how fast is not looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **environment}
    )


def test_make_bench_runs_every_section_in_small() -> None:
    made = subprocess.run(["make", "-n", "bench"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "tools/bench.py small" in made.stdout
    done = bench("small")
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("\n== ")[1:])
    by_section = {title.split()[0]: text for title, text in told.items()}
    assert list(by_section) == [
        "loss", "gradcache", "step", "loader", "npn", "checkpoint", "reshard", "audit", "kernels", "layers",
        "subset", "startup",
    ]  # fmt: skip
    for section, contenders in {
        "loss": ["open_clip.ClipLoss", "openclip"],
        "gradcache": ["GradCache-style", "ours"],
        "step": ["open_clip, accum_freq", "ours, openclip, micro-batches"],
        "checkpoint": ["torch.save", "ours, in the background"],
        "startup": ["neuclip --help", "import neuclip_scale"],
        "loader": ["open_clip", "ours", "bound: turbo decode"],
        "npn": ["by FLOPs, one process", "measured on this CPU", "modelled on GPUs"],
        "reshard": [
            "ours, kept",
            "ours, everything, -j 2",
            "tarfile, everything",
            "webdataset, kept",
            "copy and compare",
            "header walk",
            "cp",
        ],
        "audit": ["       2,000 uids"],
        "kernels": ["InfoNCE kernels" if torch.cuda.is_available() else "kernels: needs a GPU"],
        "layers": ["  GELU forward, torch" if torch.cuda.is_available() else "layers: needs a GPU"],
        "subset": ["no_filter", "clip_score --arch l14 --fraction 0.3", "basic_filter"],
    }.items():
        lines = by_section[section].splitlines()
        assert [name for name in contenders if not any(line.startswith(name) for line in lines)] == []


def test_what_is_no_section_is_bad_usage() -> None:
    done = bench("losses")
    assert done.returncode == 2
    assert "bench.py small" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_npn_is_measured_torch_beside_triton() -> None:
    """In Triton's interpreter: what `npn --device cuda` runs on a GPU."""
    script = """
import sys
sys.path.insert(0, "tools")
import bench_npn, bench_npn_gpu, torch
small = {"preset": "toy", "batch_size": 32, "num_prototypes": 32, "updates_per_step": 1, "micro_batch_size": 4}
options = bench_npn.Npn(**small, repeats=1, kernels=True, contenders=("torch highest", "triton high"))
bench_npn_gpu.show(options, bench_npn_gpu.measure(options, 1000, torch.device("cpu")))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("torch highest", "triton high", "weigh     high", "pull      high", "adagrad   high"):
        assert f"\n  {name}" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_queue_is_measured_torch_beside_triton() -> None:
    """In Triton's interpreter: what `npn --device cuda` runs on a GPU beside the NPN."""
    script = """
import sys
sys.path.insert(0, "tools")
import bench_npn, bench_queue_gpu, torch
small = {"preset": "toy", "batch_size": 32, "queue_size": 100, "repeats": 1, "kernels": True}
options = bench_npn.Npn(**small, contenders=("torch highest", "triton high", "triton medium"))
result = bench_queue_gpu.measure(options, torch.device("cpu"))
for kind in ("kept", "anew"):
    assert [len(result[kind]["runs"][name]) for name in options.contenders] == [1, 1, 1], result
bench_queue_gpu.show(options, result)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("torch highest", "triton high", "triton medium", "strip     triton high", "strip     triton medium"):
        assert f"\n  {name}" in done.stdout
    assert done.stdout.count("\n  triton medium") == 2, "of embeddings, and mapped anew"
    assert done.stdout.count("TFLOP/s") == 2 * 6


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_layers_are_measured_torch_beside_triton() -> None:
    """In Triton's interpreter, as `layers` runs on a GPU."""
    small = ("--device", "cpu", "--batch-size", "1", "--num-heads", "1", "--num-tokens", "72", "--repeats", "1")
    done = bench("layers", *small, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for name in ("GELU forward", "GELU backward", "attention forward", "attention backward"):
        for contender in ("torch", "triton"):
            assert f"\n  {name}, {contender} " in done.stdout


def test_everything_that_a_gpu_is_measured_by() -> None:
    """That the options of each run exist."""
    script = """
import sys
sys.path.insert(0, "tools")
import bench, bench_everything_gpu, tyro
for section, *arguments in bench_everything_gpu.RUNS.values():
    options = tyro.cli(bench.SECTIONS[section].options, args=arguments)
    print(section, getattr(options, "device", "cuda"))
    if section == "step":
        assert {name.removesuffix(", compiled") for name in options.contenders} <= set(bench.bench_step.PEERS)
print(bench_everything_gpu.short_name("NVIDIA A100-SXM4-80GB"))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    *sections, name = done.stdout.splitlines()
    assert len(sections) == 14
    assert all(line.endswith(" cuda") for line in sections)
    assert name == "a100-sxm4-80gb"
    assert "no such run" in bench("gpu", "--output", "new", "--only", "layer").stdout


def test_steps_are_measured_in_one_process() -> None:
    """On a CPU: what `step --device cuda` runs on a GPU."""
    script = """
import sys
sys.path.insert(0, "tools")
import bench_step, bench_step_gpu
contenders = ("open_clip", "ours, openclip", "open_clip, accum_freq", "ours, openclip, micro-batches", "ours, neuclip")
small = {"preset": "toy", "batch_size": 8, "micro_batches": 2, "steps": 1, "repeats": 2, "precision": "bf16",
         "caption_tokens": 6.0}
options = bench_step.Step(**small, contenders=contenders)
result = bench_step_gpu.measure(options)
assert [len(runs) for runs in result["runs"].values()] == [2] * 5, result
ratios = {row["contender"]: row.get("peer") for row in result["rows"]}
assert ratios["ours, neuclip"] == "open_clip", ratios
assert ratios["ours, openclip, micro-batches"] == "open_clip, accum_freq", ratios
bench_step_gpu.show(options, result)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "toy, B = 8, whole or in 2 parts, bf16, cpu" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("ours, neuclip ")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_steps_on_a_gpu_need_one() -> None:
    done = bench("step", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "step: needs a GPU: none is visible to torch, so nothing was measured"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_measured_beside_their_peers(tmp_path: Path) -> None:
    """In Triton's interpreter: what runs on a GPU, on a batch that a CPU can do."""
    path = tmp_path / "kernels.json"
    small = ("--device", "cpu", "--batch-size", "24", "--embed-dim", "32", "--repeats", "1", "--json", str(path))
    done = bench("kernels", *small, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert list(result["runs"]) == [row["contender"] for row in result["rows"]] == [
        "InfoNCE kernels", "InfoNCE triton", "InfoNCE torch", "InfoNCE open_clip.ClipLoss",
        "margin kernels", "margin triton", "margin torch",
        "SigLIP kernels", "SigLIP triton", "SigLIP torch", "SigLIP open_clip.SigLipLoss",
    ]  # fmt: skip
    assert result["rows"][0]["bound_milliseconds"] > result["rows"][-1]["bound_milliseconds"] > 0
    for name in result["runs"]:
        assert name in done.stdout


ROWS = [
    {
        "contender": "peer",
        "seconds": 2.0,
        "seconds_range": [1.5, 2500.0],
        "time_ratio": 1.0,
        "time_ratio_range": [1, 1],
    },
    {
        "contender": "ours",
        "seconds": 1.0,
        "parts": {"npn": 3_000_000},
        "time_ratio": 0.5,
        "time_ratio_range": [0.4, 0.6],
    },
]


def test_a_result_becomes_tables_and_a_plot(tmp_path: Path) -> None:
    result = {"machine": {"cpu": "2 cores"}, "commit": "abc", "rows": ROWS, "runs": {"peer": [{"seconds": 1}]}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    done = bench("report", f"{tmp_path}/result.json", "--plot", f"{tmp_path}/new/plot.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "commit abc; 2 cores",
        "",
        "| contender | seconds | time ratio | parts npn |",
        "|---|---|---|---|",
        "| peer | 2 (1.5 to 2,500) | 1 |  |",
        "| ours | 1 | 0.5 (0.4 to 0.6) | 3,000,000 |",
    ]
    with Image.open(tmp_path / "new" / "plot.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 5, "an empty picture"


def test_what_compares_nothing_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"rows": [{"contender": "x", "cpu_seconds": 1.0}]}))
    done = bench("report", f"{tmp_path}/result.json", "--plot", f"{tmp_path}/plot.png")
    assert done.returncode == 1
    assert "Leave out --plot" in done.stderr


def test_growth_with_the_batch_is_fitted_and_drawn(tmp_path: Path) -> None:
    sizes = ["--scaling", "64", "256", "--embed-dim", "16", "--repeats", "1"]
    done = bench("loss", *sizes, "--json", f"{tmp_path}/result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["batch_size"] for row in result["rows"]] == [64, 256]
    low, high = (row["cpu_seconds"] for row in result["rows"])
    assert 4 ** result["time_exponent"] == pytest.approx(high / low)
    assert result["machine"]["date"]
    assert result["commit"]
    drawn = bench("report", f"{tmp_path}/result.json", "--plot", f"{tmp_path}/plot.svg")
    assert drawn.returncode == 0, drawn.stderr
    assert "time_exponent: " in drawn.stdout
    assert (tmp_path / "plot.svg").stat().st_size > 1000
