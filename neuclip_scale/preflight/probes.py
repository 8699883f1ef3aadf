"""What one rank can find out without the others: software, GPU, storage, data. Each returns (problem, detail)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from neuclip_scale import __version__
from neuclip_scale.data.manifest_file import SUFFIXES
from neuclip_scale.data.shards import ShardError, expand_source, split_sources, storage
from neuclip_scale.telemetry.environment import git_revision, gpu_names, package_versions

GIB = 2**30
FREE_FRACTION = 0.9
"""Of a GPU's memory that must be free: less, and another program is on it."""
_SMI_SECONDS = 30
_SMI_FIELDS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the driver was loaded",
    "remapped_rows.failure": "rows of its memory could not be remapped",
    "remapped_rows.pending": "rows of its memory wait to be remapped: the GPU wants a reset",
}

Found = tuple[str, str]


def versions() -> dict[str, str]:
    """Whatever must be the same on all nodes."""
    revision = git_revision(Path(__file__).resolve().parents[2]) or {}
    gpus = gpu_names()
    return {
        "GPUs": f"{len(gpus)} {', '.join(sorted(set(gpus)))}".strip(),
        "python": platform.python_version(),
        "neuclip_scale": f"{__version__} {str(revision.get('commit', ''))[:12]}".strip(),
        **package_versions(),
    }


def gpu(local_rank: int, ranks_here: int) -> Found:
    """This rank's GPU: there, free, and able to multiply; nothing to say on a node without GPUs."""
    import torch

    from neuclip_scale.preflight.machine import ProbeError, gpu_arithmetic

    count = torch.cuda.device_count()
    if not count:
        if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
            return "there is an NVIDIA GPU, but torch cannot use it: see nvidia-smi and `neuclip doctor`", ""
        return "", "none"
    index = 0 if count == 1 else local_rank  # --gpus-per-task=1 shows each task its own only
    if index >= count:
        return f"{count} GPU(s) for {ranks_here} ranks: one has fallen off the bus, or ask for fewer tasks", ""
    try:
        gpu_arithmetic(index, torch.float16)
        seconds = _matmul_seconds(index)
        free, total = torch.cuda.mem_get_info(index)
    except (RuntimeError, ProbeError) as error:
        return f"GPU {index}: {str(error).splitlines()[0]}", ""
    if free < FREE_FRACTION * total:
        return f"GPU {index}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free: another program is on it", ""
    rate = 2 * _MATMUL**3 * _REPEATS / seconds / 1e12
    return "", f"{torch.cuda.get_device_name(index)}, {total / GIB:.0f} GiB, {rate:.0f} TFLOP/s"


_MATMUL, _REPEATS = 4096, 10


def _matmul_seconds(index: int) -> float:
    import torch

    left = torch.randn(_MATMUL, _MATMUL, device=f"cuda:{index}", dtype=torch.float16)
    for repeats in (2, _REPEATS):
        torch.cuda.synchronize(index)
        began = time.perf_counter()
        for _ in range(repeats):
            left @ left
        torch.cuda.synchronize(index)
    return time.perf_counter() - began


def gpu_health() -> Found:
    """What the driver says of all GPUs of this node: memory errors, and Xid messages of the last boot."""
    if shutil.which("nvidia-smi") is None:
        return "", "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu=index,{','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi gave no answer in {_SMI_SECONDS} s: the driver hangs, restart the node", ""
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[-1]}", ""
    return "; ".join(memory_problems(done.stdout)), f"{len(done.stdout.splitlines())} GPU(s){_xid_messages()}"


def memory_problems(table: str) -> list[str]:
    """What is wrong by nvidia-smi's table of `_SMI_FIELDS`; `[N/A]` is a GPU that does not count."""
    problems = []
    for line in table.splitlines():
        index, *values = (value.strip() for value in line.split(","))
        for value, text in zip(values, _SMI_FIELDS.values(), strict=True):
            if value.lower() == "yes" or (value.isdigit() and int(value)):
                problems.append(f"GPU {index}: {text}" + (f" ({value})" if value.isdigit() and value != "1" else ""))
    return problems


def _xid_messages() -> str:
    """The kernel's last word on a GPU, where it may be read; it may be old, so it is told and not judged."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if "NVRM: Xid" in line]
    return f", {len(lines)} Xid message(s), the last: {lines[-1]}" if lines else ""


def data(train: str) -> Found:
    """The first shard, or the manifest, of every source of `data.train` can be read here."""
    seen = []
    for part in split_sources(train):
        try:
            seen.append(_first(part))
        except (ShardError, OSError, ValueError) as error:
            return str(error), ""
    return "", "; ".join(seen)


def _first(part: str) -> str:
    if storage.is_pipe(part):
        return f"{part!r} is a command, not run"
    is_manifest = part.partition("?")[0].endswith(SUFFIXES)
    address = part if is_manifest else expand_source(part)[0]
    if storage.is_remote(address):
        return f"{address}, {storage.facts(address).num_bytes} bytes"
    with open(address, "rb") as file:
        if len(file.read(512)) < 4:
            raise ShardError(f"shard {address}: it is empty. Write it anew.")
    return address


class SharedFolder:
    """A folder in which every node writes a file that every other must see."""

    def __init__(self, folder: Path, node: int, num_nodes: int) -> None:
        self.folder, self.node, self.num_nodes = Path(folder), node, num_nodes

    def write(self, name: str) -> Found:
        """Write this node's own file; `name` is the node's."""
        began = time.perf_counter()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._path(self.node).with_suffix(".tmp")
            with open(partial, "w", encoding="utf-8") as file:
                file.write(name)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path(self.node))
        except OSError as error:
            return f"cannot write to {self.folder}: {error}", ""
        return "", f"written in {time.perf_counter() - began:.2f} s"

    def missing(self, seconds: float) -> list[int]:
        """Numbers of the nodes whose files are not seen here after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            absent = [number for number in range(self.num_nodes) if not self._is_seen(number)]
            if not absent or time.monotonic() > deadline:
                return absent
            time.sleep(0.1)

    def _is_seen(self, number: int) -> bool:
        try:
            # Listing as well: a network file system may remember for a while that a name was not there.
            os.listdir(self.folder)
            return bool(self._path(number).read_text("utf-8"))
        except OSError:
            return False

    def _path(self, number: int) -> Path:
        return self.folder / f"node_{number:05d}"
