"""Contenders by turns in one process, timed on one device: what the sections of tools/bench.py that need a GPU share.

On a CPU the same code only shows that it works.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

MEBIBYTE = 1 << 20
NO_GPU = "a GPU: none is visible to torch, so nothing was measured"

Runs = dict[str, list[dict[str, float]]]
"""Measurements of each contender, round after round."""


def is_missing(device: Any) -> bool:
    """Whether `device` is a GPU and there is none."""
    import torch

    return torch.device(device).type == "cuda" and not torch.cuda.is_available()


def name_of(device: Any) -> str:
    """What torch calls the device."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def timed(action: Callable[[], object], device: Any) -> dict[str, float]:
    """Milliseconds of one call, by CUDA events on a GPU, and the most memory that it added there."""
    import torch

    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        action()
        return {"milliseconds": (time.perf_counter() - began) * 1e3, "added_mib": 0.0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    action()
    last.record()
    torch.cuda.synchronize()
    added = torch.cuda.max_memory_allocated() - before
    return {"milliseconds": first.elapsed_time(last), "added_mib": added / MEBIBYTE}


def copy_speed(device: Any) -> float:
    """Bytes per second, read and written, of a large copy: the best of five."""
    import torch

    source = torch.empty((1 << 28) if torch.device(device).type == "cuda" else (1 << 20), device=device)
    target = torch.empty_like(source)
    runs = in_turns({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.nbytes / min(run["milliseconds"] for run in runs) * 1e3


@contextmanager
def clock_and_power(device: Any) -> Iterator[dict[str, float]]:
    """Means over what runs inside, `sm_mhz` and `watts`, of NVML's readings; nothing where there are none. Its watts
    are themselves a mean over the last second, so of a shorter run they say little.
    """
    import torch

    seen: dict[str, float] = {}
    try:
        from neuclip_scale.telemetry.energy import open_nvml

        nvml, handle = open_nvml(torch.device(device))
    except Exception:  # no GPU, no nvidia-ml-py, or a driver that does not tell
        nvml = None
    if nvml is None:
        yield seen
        return
    readings: list[tuple[float, float]] = []
    done = threading.Event()

    def read() -> None:
        while not done.wait(0.02):
            with suppress(nvml.NVMLError):
                mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
                readings.append((mhz, nvml.nvmlDeviceGetPowerUsage(handle) / 1e3))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield seen
    finally:
        done.set()
        reader.join()
        if readings:
            seen["sm_mhz"], seen["watts"] = (statistics.mean(kind) for kind in zip(*readings, strict=True))


def against_bound(runs: list[dict[str, float]], bound: float) -> dict[str, Any]:
    """A contender's times, and what part of them the bound is, all in milliseconds: a part of its row."""
    times = [run["milliseconds"] for run in runs]
    median = statistics.median(times)
    return {
        "milliseconds": median,
        "milliseconds_range": [min(times), max(times)],
        "bound_milliseconds": bound,
        "share_of_bound": bound / median,
    }


def in_turns(
    work: Mapping[str, Callable[[], object]],
    repeats: int,
    device: Any,
    around: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    uncounted: int = 1,
) -> Runs:
    """Every contender once in each round, `around` its name; the first `uncounted`, which compile, are left out."""
    runs: Runs = {}
    for repeat in range(-uncounted, repeats):
        for name, action in work.items():
            with around(name):
                run = timed(action, device)
            if repeat >= 0:
                runs.setdefault(name, []).append(run)
    return runs


@contextmanager
def computed_by(contender: str) -> Iterator[None]:
    """Have torch or Triton compute as a contender's name says: `torch`, or with fp32's precision, `triton high`, and
    whatever else."""
    import torch

    implementation, *more = contender.split()
    before = os.environ.get("NEUCLIP_SIMILARITY"), torch.get_float32_matmul_precision()
    os.environ["NEUCLIP_SIMILARITY"] = implementation
    torch.set_float32_matmul_precision(more[0] if more else before[1])
    try:
        yield
    finally:
        os.environ.pop("NEUCLIP_SIMILARITY")
        if before[0] is not None:
            os.environ["NEUCLIP_SIMILARITY"] = before[0]
        torch.set_float32_matmul_precision(before[1])
