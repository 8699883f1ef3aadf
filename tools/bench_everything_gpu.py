"""All that a GPU is measured by, one after the other and nothing beside it: `python tools/bench.py gpu`.

Each section is a process of its own, which frees its memory and compiles while nobody else measures. Compilation takes
most of the time; `--only` names those that are wanted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench_device import NO_GPU, is_missing, name_of

STEP = ("step", "--device", "cuda", "--precision", "bf16", "--preset")
COMPILED = ("open_clip, compiled", "ours, openclip, compiled")
SEVERAL = ("ours, openclip, micro-batches", "ours, openclip, micro-batches, compiled")
RUNS: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels", "--repeats", "5", "--contenders", "kernels", "triton", "open_clip"),
    "layers": ("layers",),
    "layers_captions": ("layers", "--causal", "--num-tokens", "77", "--num-heads", "8"),
    "npn": ("npn", "--device", "cuda", "--kernels"),
    "step_b16": (
        *STEP, "ViT-B-16", "--batch-size", "512", "--steps", "5", "--repeats", "3", "--contenders",
        "open_clip", "ours, openclip", *COMPILED, "ours, neuclip, compiled", *SEVERAL,
    ),
    "step_b16_parts": (
        *STEP, "ViT-B-16", "--batch-size", "1024", "--micro-batches", "2", "--steps", "3", "--repeats", "3",
        "--contenders", "ours, openclip, compiled", "ours, openclip, micro-batches, compiled",
    ),
    "step_b16_graphs": (
        *STEP, "ViT-B-16", "--batch-size", "512", "--micro-batches", "4", "--steps", "5", "--repeats", "3",
        "--contenders", "ours, openclip, compiled", "ours, openclip, micro-batches, compiled",
        "ours, openclip, micro-batches, graphs, compiled", "ours, openclip, micro-batches, two kept, graphs, compiled",
    ),
    "step_b16_fsdp2": (
        *STEP, "ViT-B-16", "--batch-size", "512", "--steps", "5", "--repeats", "3", "--contenders",
        "ours, openclip, compiled", "ours, openclip, fsdp2, compiled", "ours, openclip, fsdp2, resharding, compiled",
    ),
    "step_b16_captions": (
        *STEP, "ViT-B-16", "--batch-size", "512", "--steps", "5", "--repeats", "3", "--caption-tokens", "16",
        "--contenders", *COMPILED,
    ),
    "step_b16_1024": (
        *STEP, "ViT-B-16", "--batch-size", "1024", "--steps", "3", "--repeats", "3", "--contenders", *COMPILED,
    ),
    "step_l14": (
        *STEP, "ViT-L-14", "--batch-size", "128", "--steps", "5", "--repeats", "3", "--contenders",
        "open_clip", "ours, openclip", *COMPILED,
    ),
    "step_l14_checkpointed": (
        *STEP, "ViT-L-14", "--batch-size", "352", "--steps", "3", "--repeats", "3", "--contenders",
        "ours, openclip, checkpointed", "ours, openclip, checkpointed, compiled",
    ),
    "step_l14_256": (
        *STEP, "ViT-L-14", "--batch-size", "256", "--steps", "5", "--repeats", "3", "--contenders", *COMPILED,
    ),
    "step_b16_large": (
        *STEP, "ViT-B-16", "--batch-size", "4096", "--micro-batches", "8", "--steps", "1", "--repeats", "2",
        "--contenders", "open_clip", "open_clip, accum_freq", *SEVERAL,
    ),
}  # fmt: skip
"""Name of the result and what is run."""


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Every section that a GPU has, in turn."""

    output: str
    """Folder of the results, NAME_GPU.json each; a new one."""
    only: tuple[str, ...] = tuple(RUNS)
    """Which of them."""


def run(options: Everything) -> int:
    """Measure them; returns an exit status. A failure does not hold up the others."""
    if unknown := set(options.only) - set(RUNS):
        print(f"--only {' '.join(sorted(unknown))}: there is no such run. Choose from {', '.join(RUNS)}.")
        return 2
    if is_missing("cuda"):
        print(f"gpu: needs {NO_GPU}")
        return 0
    folder = Path(options.output)
    if any(folder.glob("*.json")):
        print(f"--output {folder}: there are results in it. Choose another folder.")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.only:
        result = folder / f"{name}_{short_name(name_of('cuda'))}.json"
        print(f"\n== {name}: {' '.join(RUNS[name])}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("bench.py")), *RUNS[name], "--json", result]
        )
        failed += done.returncode != 0
        print(f"== {name}: {time.monotonic() - began:.0f} s, status {done.returncode}, {result}", flush=True)
    return int(failed > 0)


def short_name(device: str) -> str:
    """h200 for "NVIDIA H200", a100-sxm4-80gb for "NVIDIA A100-SXM4-80GB"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia").strip())
