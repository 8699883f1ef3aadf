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


_HOPPER = {"nvlink": 450e9, "network": 50e9, "pcie": 64e9}
_AMPERE = {"nvlink": 300e9, "network": 25e9, "pcie": 32e9, "arithmetic": GPUS["A100", "SXM"]}
_A100 = 'NVIDIA, data sheet "A100 Tensor Core GPU" (SXM); network: data sheet "DGX A100", 8 x 200 Gb/s'
GPU_TYPES = {
    "h100": GpuType(
        "H100 SXM 80 GB", 80 * 10**9, 3.35e12, **_HOPPER, arithmetic=GPUS["H100", "HBM3"],
        source='NVIDIA, data sheet "H100 Tensor Core GPU" (SXM); network: data sheet "DGX H100", 8 x 400 Gb/s',
    ),
    "h200": GpuType(
        "H200 SXM 141 GB", 141 * 10**9, 4.8e12, **_HOPPER, arithmetic=GPUS["H200", ""],
        source='NVIDIA, data sheet "H200 Tensor Core GPU" (SXM); network: data sheet "DGX H200", 8 x 400 Gb/s',
    ),
    "a100-80": GpuType("A100 SXM 80 GB", 80 * 10**9, 2.039e12, **_AMPERE, source=_A100),
    "a100-40": GpuType("A100 SXM 40 GB", 40 * 10**9, 1.555e12, **_AMPERE, source=_A100),
}  # fmt: skip
GPU_TYPES["a100"] = GPU_TYPES["a100-80"]
