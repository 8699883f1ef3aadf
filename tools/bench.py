"""Measure what costs time or memory, side by side in one run with what people use today.

    python tools/bench.py loss [--batch-size 8192] [--embed-dim 512] [--threads 1] [--repeats 3] [--json PATH]
    python tools/bench.py loader [--num-workers 0] [--batch-size 128] [--repeats 3] [--json PATH]
    python tools/bench.py npn [--batch-size 4096] [--num-prototypes 4096] [--updates-per-step 10] [--json PATH]
    python tools/bench.py reshard [--samples 20000] [--keep 0.3] [--folder /dev/shm] [--plan-uids N] [--json PATH]
    python tools/bench.py audit [--rows 1000000 5000000 20000000] [--folder DIR] [--json PATH]
    python tools/bench.py kernels [--batch-size 65536] [--embed-dim 512] [--dtype bfloat16] [--json PATH]
    python tools/bench.py subset [--rows 5000000] [--folder DIR] [--json PATH]
    python tools/bench.py small

`loss`: each measurement is a fresh process, ours and the peer's by turns, so that drift of the machine falls on both.
Times on a CPU are for ratios only. `bound` is the arithmetic that cannot be avoided, at the speed of one matmul
measured in the same process. `loader`: pictures per second of one core
(tools/bench_loader.py). `npn`: the NPN's share of an iteration, and how to spread it (tools/bench_npn.py).
`reshard`: beside a tarfile filter, webdataset, a header walk and cp (tools/bench_reshard.py). `audit`: lists of growing
length (tools/bench_audit.py). `subset`: DataComp's filters over a pool's metadata (tools/bench_subset.py). `kernels`:
the losses on a GPU, by Triton, torch and open_clip (tools/bench_kernels.py). `small`: all of them in a form that takes
a minute, for a look; its figures say nothing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import bench_audit
import bench_kernels
import bench_loader
import bench_npn
import bench_reshard
import bench_subset
import tyro

MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Forward and backward of the contrastive losses over one process's batch, fp32."""

    batch_size: int = 8192
    """B, pairs."""
    embed_dim: int = 512
    """d, embedding width."""
    threads: int = 1
    """Threads of every process."""
    repeats: int = 3
    """Measurements of each contender."""
    contenders: tuple[str, ...] = ("open_clip.ClipLoss", "openclip", "fastclip-v3", "neuclip")
    """What to measure; the first is the peer the others are compared with."""
    tile_size: int = 1024
    """Edge of our similarity tiles."""
    json: str = ""
    """Write every measurement to this file."""


def child(options: Loss, contender: str) -> None:
    """Measure one contender in this process and print a JSON line."""
    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    B, d = options.batch_size, options.embed_dim
    loss = _make_loss(contender, options)
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    matmul_seconds = _matmul_seconds(B, d)

    def features(count: int) -> tuple[Any, Any]:
        image = normalize(torch.randn(count, d), dim=1)
        text = normalize(image + torch.randn(count, d) / d**0.5, dim=1)
        return image.requires_grad_(), text.requires_grad_()

    index = torch.arange(B)
    for _ in range(2):  # load kernels; the u table and the NPN start in their first step
        image, text = features(256)
        loss(image, text, scale, index[:256]).backward()
    image, text = features(B)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.perf_counter()
    loss(image, text, scale, index).backward()
    seconds = time.perf_counter() - began
    added = _resident_bytes("VmHWM") - before
    print(json.dumps({"seconds": seconds, "added_mib": added / MEBIBYTE, "matmul_seconds": matmul_seconds}))


def _make_loss(contender: str, options: Loss) -> Any:
    if contender == "open_clip.ClipLoss":
        from open_clip.loss import ClipLoss

        peer = ClipLoss()
        return lambda image, text, scale, index: peer(image, text, scale)
    from neuclip_scale import create_loss

    loss = create_loss(
        contender, embed_dim=options.embed_dim, dataset_size=options.batch_size, tile_size=options.tile_size
    )
    return lambda image, text, scale, index: loss(image, text, scale, sample_index=index)


def _matmul_seconds(B: int, d: int) -> float:
    """Seconds of one product of 2 B^2 d FLOPs, done in slices so that it needs no B x B matrix."""
    import torch

    left, right, out = torch.randn(1024, d), torch.randn(1024, d), torch.empty(1024, 1024)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(8):
            torch.mm(left, right.T, out=out)
        best = min(best, (time.perf_counter() - began) / 8)
    return best * (B / 1024) ** 2


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def measure(options: Loss) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.contenders}
    for repeat in range(options.repeats):
        for name in options.contenders:
            print(f"\r{repeat + 1}/{options.repeats} {name:<24}", end="", file=sys.stderr, flush=True)
            arguments = [sys.executable, __file__, "--child", name, json.dumps(asdict(options))]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    peer = options.contenders[0]
    rows = [_row(name, runs[name], runs[peer]) for name in options.contenders]
    return {"rows": rows, "runs": runs}


def _row(name: str, runs: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, Any]:
    seconds, memory = [run["seconds"] for run in runs], [run["added_mib"] for run in runs]
    peer_seconds = statistics.median(run["seconds"] for run in peer)
    peer_memory = statistics.median(run["added_mib"] for run in peer)
    # Four products (tiles twice, two gradients) are the least without keeping the B x B matrix.
    bound = 4 * statistics.median(run["matmul_seconds"] for run in runs)
    return {
        "contender": name,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "time_ratio": statistics.median(seconds) / peer_seconds,
        "added_mib": statistics.median(memory),
        "memory_ratio": statistics.median(memory) / peer_memory,
        "bound_seconds": bound,
        "share_of_bound": bound / statistics.median(seconds),
    }


def _machine() -> dict[str, str]:
    return {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def show(options: Loss, result: dict[str, Any]) -> None:
    """Print the comparison."""
    size = f"B = {options.batch_size}, d = {options.embed_dim}"
    print(f"{size}, fp32, {options.threads} thread(s), commit {result['commit']}")
    print(f"{'':<20}{'time':>8}{'ratio':>8}{'added MiB':>11}{'ratio':>8}{'4-product bound':>17}{'share':>8}")
    for row in result["rows"]:
        print(
            f"{row['contender']:<20}{row['seconds']:>7.2f}s{row['time_ratio']:>8.2f}{row['added_mib']:>11.0f}"
            f"{row['memory_ratio']:>8.3f}{row['bound_seconds']:>16.2f}s{row['share_of_bound']:>8.0%}"
        )


class Section(NamedTuple):
    """One comparison: its options, what measures them and what prints the result."""

    options: type
    measure: Callable[[Any], dict[str, Any]]
    show: Callable[[Any, dict[str, Any]], None]
    small: tuple[str, ...]
    """Arguments with which it takes seconds: to see that it works and what it tells, not for figures."""


SECTIONS = {
    "loss": Section(
        Loss, measure, show,
        ("--batch-size", "1024", "--embed-dim", "64", "--repeats", "1", "--contenders", "open_clip.ClipLoss",
         "openclip"),
    ),
    "loader": Section(
        bench_loader.Loader, bench_loader.measure, bench_loader.show,
        ("--num-pictures", "64", "--batch-size", "8", "--num-batches", "3", "--repeats", "1", "--contenders",
         bench_loader.PEER, "ours", bench_loader.BOUND),
    ),
    "npn": Section(
        bench_npn.Npn, bench_npn.measure, bench_npn.show,
        ("--preset", "toy", "--batch-size", "128", "--num-prototypes", "128", "--repeats", "1"),
    ),
    "reshard": Section(
        bench_reshard.Reshard, bench_reshard.measure, bench_reshard.show,
        ("--samples", "300", "--workers", "2", "--repeats", "1"),
    ),
    "audit": Section(
        bench_audit.Audit, bench_audit.measure, bench_audit.show,
        ("--rows", "2000"),
    ),
    "kernels": Section(
        bench_kernels.Kernels, bench_kernels.measure, bench_kernels.show,
        ("--batch-size", "4096", "--repeats", "1"),
    ),
    "subset": Section(
        bench_subset.Subset, bench_subset.measure, bench_subset.show,
        ("--rows", "2000"),
    ),
}  # fmt: skip


def run(name: str, arguments: Sequence[str]) -> None:
    """Measure one section, show it and write it where --json says."""
    section = SECTIONS[name]
    options = tyro.cli(section.options, args=arguments, prog=f"bench.py {name}")
    result = {"options": asdict(options), "machine": _machine(), "commit": _commit(), **section.measure(options)}
    section.show(options, result)
    write(result, options.json)


def main() -> int:
    """Run the chosen section, or all of them in small."""
    name, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if name == "--child":
        values = json.loads(sys.argv[3])
        child(Loss(**{**values, "contenders": tuple(values["contenders"])}), sys.argv[2])
    elif name == "small" and not arguments:
        for each, section in SECTIONS.items():
            print(f"\n== {each} {' '.join(section.small)}")
            run(each, section.small)
    elif name in SECTIONS:
        run(name, arguments)
    else:
        print(__doc__)
        return 0 if name in ("-h", "--help") else 2
    return 0


def write(result: dict[str, Any], path: str) -> None:
    """Write `result` to `path`, if one was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
