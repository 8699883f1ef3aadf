"""The software and hardware a run had, for the record beside its results."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from neuclip_scale import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "numpy",
    "pillow",
    "tokenizers",
    "tensorboard",
    "triton",
    "deepspeed",
)


def environment() -> dict[str, Any]:
    """Versions, code revision, host, CPU, GPUs and launch of this process, as plain JSON values."""
    from neuclip_scale.distributed import read_launch  # torch: `neuclip doctor --help` uses this module too

    return {
        "neuclip_scale": __version__,
        "git": git_revision(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "hostname": socket.gethostname(),
        "cpu": cpu_name(),
        "num_cpus": usable_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpu_names(),
        "cuda": cuda_version(),
        "world_size": read_launch().world_size,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; absent ones are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `root`, and whether tracked files differ (None: git could not say); None for an
    installed package."""
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git here: the record goes without the commit
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """Model of the CPU as Linux names it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """CPUs this process may run on, which a scheduler or container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_names() -> list[str]:
    """Names of the GPUs torch can see."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cuda_version() -> str | None:
    """CUDA version torch was built with; None for a CPU build."""
    import torch

    return torch.version.cuda
