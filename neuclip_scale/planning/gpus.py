"""GPUs that a run can be planned for, by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from neuclip_scale.config import ConfigError
from neuclip_scale.telemetry.devices import GPUS, Gpu


@dataclass(frozen=True)
class GpuType:
    """One kind of GPU in the maker's own eight-GPU node."""

    name: str
    memory: int
    """Bytes, of 10^9 each as data sheets count; drivers show a little more."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    nvlink: float
    """Bytes a second that it sends to its neighbours: half of what data sheets give for both directions."""
    network: float
    """Bytes a second that it sends to other nodes, by the node's network cards over its GPUs."""
    pcie: float
    """Bytes a second to the host, one direction."""
    arithmetic: Gpu
    """Peaks and board power, from `telemetry.devices`."""
    source: str

    def peak(self, precision: str) -> float:
        """Dense peak in FLOP/s; raises `ConfigError` for a precision that it does not take."""
        value = {"bf16": self.arithmetic.bf16, "fp16": self.arithmetic.fp16, "fp32": self.arithmetic.fp32}[precision]
        if value is None:
            raise ConfigError("train.precision", precision, f"{self.name} does not take it", "Use fp16 or fp32.")
        return value * 1e12


def _hopper(name: str, gigabytes: int, bandwidth: float, arithmetic: Gpu, sheet: str) -> GpuType:
    source = f'NVIDIA, data sheet "{sheet} Tensor Core GPU" (SXM); network: data sheet "DGX {sheet}", 8 x 400 Gb/s'
    return GpuType(name, gigabytes * 10**9, bandwidth, 450e9, 50e9, 64e9, arithmetic, source)


def _a100(gigabytes: int, bandwidth: float) -> GpuType:
    source = 'NVIDIA, data sheet "A100 Tensor Core GPU" (SXM); network: data sheet "DGX A100", 8 x 200 Gb/s'
    name = f"A100 SXM {gigabytes} GB"
    return GpuType(name, gigabytes * 10**9, bandwidth, 300e9, 25e9, 32e9, GPUS["A100", "SXM"], source)


GPU_TYPES = {
    "h100": _hopper("H100 SXM 80 GB", 80, 3.35e12, GPUS["H100", "HBM3"], "H100"),
    "h200": _hopper("H200 SXM 141 GB", 141, 4.8e12, GPUS["H200", ""], "H200"),
    "a100-80": _a100(80, 2.039e12),
    "a100-40": _a100(40, 1.555e12),
}
GPU_TYPES["a100"] = GPU_TYPES["a100-80"]
