"""Energy of training: measured where the machine has a counter that may be read, else an estimate that says so.

A meter counts between `start` and `stop`, as often as these alternate, so that evaluation and checkpoints can be left
out. `source` begins with "measured", "estimate" or, where a counter failed on the way, "incomplete".
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neuclip_scale.telemetry.devices import find_gpu

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CPU_CORE = 10.0
"""Assumed where nothing can be read: a server's CPU at full load, with its memory, per core in use."""
WATTS_PER_GPU = 300.0
"""Assumed for a GPU whose board power is not known."""
PERIOD = 5.0
"""Seconds between readings: RAPL's counters start over after minutes, and a second turn would not be seen."""


class EnergyMeter(ABC):
    """Joules of this rank's share of the machine, between `start` and `stop`."""

    source: str
    """What `joules` is: how measured and what it covers, or "estimate: " and what it is computed from."""

    def __init__(self) -> None:
        self.joules = 0.0
        self._runs = self._failed = False
        self._read_at = time.monotonic()

    def start(self) -> None:
        """Count from now on."""
        self._runs = True
        self._guard(self._reset)

    def update(self) -> None:
        """Bring `joules` up to date, if the meter runs."""
        if self._runs:
            self._guard(self._add)

    def stop(self) -> None:
        """Count no further."""
        self.update()
        self._runs = False

    def tick(self) -> None:
        """To be called in every step: `update` when `PERIOD` is over."""
        if time.monotonic() - self._read_at > PERIOD:
            self.update()

    def _add(self) -> None:
        self.joules += self._since_last()
        self._read_at = time.monotonic()

    def _guard(self, read: Callable[[], None]) -> None:
        """Call `read`; a counter that fails must not end days of training, but the result has to say so."""
        if self._failed:
            return
        try:
            read()
        except (OSError, RuntimeError, ValueError) as error:
            self._failed = True
            self.source = f"incomplete, the counter failed during training ({error}); {self.source}"
            log.warning("energy: %s", self.source)

    @abstractmethod
    def _reset(self) -> None:
        """Forget what was used until now."""

    @abstractmethod
    def _since_last(self) -> float:
        """Joules since the last call or `_reset`."""


class NvmlMeter(EnergyMeter):
    """The energy counter of one NVIDIA GPU (Volta and later). Raises RuntimeError where NVML has none."""

    source = "measured: NVML, GPU boards alone"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._nvml, self._handle = open_nvml(device)
        self._last = self._read()

    def _read(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000  # it counts millijoules
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"NVML's energy counter: {error}") from error

    def _reset(self) -> None:
        self._last = self._read()

    def _since_last(self) -> float:
        before, self._last = self._last, self._read()
        return self._last - before


class RaplMeter(EnergyMeter):
    """The counters of all CPU packages of this machine, which also count what other processes use.

    Raises FileNotFoundError where there are none, PermissionError where they may not be read.
    """

    source = "measured: RAPL, CPU packages alone, with whatever else ran on them"

    def __init__(self, root: Path = POWERCAP) -> None:
        super().__init__()
        # intel-rapl:0 is a domain of its own, intel-rapl:0:1 a part of it; psys, the platform, holds the packages too.
        found = [p for p in sorted(root.glob("intel-rapl:*")) if p.name.count(":") == 1]
        self._packages = [p for p in found if (p / "name").read_text("ascii").startswith("package")]
        if not self._packages:
            raise FileNotFoundError(f"{root}: no RAPL package")
        self._ranges = [int((p / "max_energy_range_uj").read_text("ascii")) for p in self._packages]
        self._last = self._read()

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text("ascii")) for package in self._packages]

    def _reset(self) -> None:
        self._last = self._read()

    def _since_last(self) -> float:
        before, self._last = self._last, self._read()
        used = 0
        for old, new, limit in zip(before, self._last, self._ranges, strict=True):
            used += new - old if new >= old else new - old + limit  # started over at max_energy_range_uj
        return used / 1e6


class EstimatedMeter(EnergyMeter):
    """Seconds times a power that was not measured."""

    def __init__(self, watts: float, reason: str) -> None:
        super().__init__()
        self.watts = watts
        self.source = f"estimate: {watts:g} W per device x seconds ({reason})"
        self._last = time.perf_counter()

    def _reset(self) -> None:
        self._last = time.perf_counter()

    def _since_last(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self.watts * (self._last - before)


class NoMeter(EnergyMeter):
    """Nothing: another rank of this machine counts for all of it."""

    source = ""

    def _reset(self) -> None:
        pass

    def _since_last(self) -> float:
        return 0.0


def energy_meter(device: torch.device, *, local_rank: int = 0, powercap: Path = POWERCAP) -> EnergyMeter:
    """The best meter for a rank that computes on `device`; its `source` says which.

    RAPL counts whole machines, so the first rank of each reads it and the others get a `NoMeter`.
    """
    if device.type == "cuda":
        try:
            return NvmlMeter(device)
        except (ImportError, RuntimeError):
            return EstimatedMeter(*_gpu_power(device))
    try:
        meter = RaplMeter(powercap)
    except FileNotFoundError:
        return EstimatedMeter(*_cpu_power("this machine has no RAPL"))
    except PermissionError:
        return EstimatedMeter(*_cpu_power("RAPL is here, but only root may read it"))
    return meter if local_rank == 0 else NoMeter()


def open_nvml(device: torch.device) -> tuple[Any, Any]:
    """NVML's Python module and the handle of torch's `device`; raises ImportError or RuntimeError."""
    import pynvml  # nvidia-ml-py, which brings it, is no dependency

    try:
        pynvml.nvmlInit()
        # By UUID: NVML numbers the GPUs in another order, and CUDA_VISIBLE_DEVICES hides some from torch.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except pynvml.NVMLError as error:
        raise RuntimeError(f"NVML: {error}") from error


def _gpu_power(device: torch.device) -> tuple[float, str]:
    """Watts and where they are from: the board's limit now, its data sheet, or a default."""
    try:
        nvml, handle = open_nvml(device)
        return nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, "the GPU's power limit"
    except Exception:  # any failure of NVML leaves the data sheet
        gpu = find_gpu(torch.cuda.get_device_name(device))
    if gpu is not None:
        return gpu.watts, "the GPU's board power by its data sheet; install nvidia-ml-py to measure"
    return WATTS_PER_GPU, "assumed for an unknown GPU; install nvidia-ml-py to measure"


def _cpu_power(why: str) -> tuple[float, str]:
    threads = torch.get_num_threads()
    return WATTS_PER_CPU_CORE * threads, f"{WATTS_PER_CPU_CORE:g} W assumed for each of {threads} CPU cores; {why}"
