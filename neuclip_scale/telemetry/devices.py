"""Peak arithmetic and board power of GPUs, from their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Dense peaks in TFLOP/s (half of the advertised figures "with sparsity"), and board power."""

    half: float | None
    """bf16 and fp16 with fp32 accumulation on tensor cores; None where bf16 and fp16 differ."""
    full: float
    """fp32 without TF32, torch's default."""
    watts: float
    """Maximum thermal design power of the board."""


# NVIDIA data sheets: "H100 Tensor Core GPU" (SXM, PCIe, NVL), "H200 Tensor Core GPU" (SXM, NVL), "A100 Tensor Core GPU"
# (SXM, PCIe), "A10" and, for the A10G, AWS's G5 description, "L40S", "L4", "V100" (SXM2, PCIe), "T4". All parts of a
# key must be in torch's name of the device; the first key that fits counts, so the special ones stand first.
GPUS: dict[tuple[str, ...], Gpu] = {
    ("H200", "NVL"): Gpu(835.5, 60.0, 600.0),
    ("H200",): Gpu(989.5, 67.0, 700.0),
    ("H100", "PCIe"): Gpu(756.0, 51.0, 350.0),
    ("H100", "NVL"): Gpu(835.5, 60.0, 400.0),
    ("H100", "HBM3"): Gpu(989.5, 67.0, 700.0),
    ("A100", "SXM"): Gpu(312.0, 19.5, 400.0),
    ("A100", "80GB PCIe"): Gpu(312.0, 19.5, 300.0),
    ("A100", "PCIE"): Gpu(312.0, 19.5, 250.0),
    ("L40S",): Gpu(362.0, 91.6, 350.0),
    ("A10G",): Gpu(70.0, 35.0, 300.0),
    ("A10",): Gpu(125.0, 31.2, 150.0),
    ("L4",): Gpu(121.0, 30.3, 72.0),
    # fp16 alone: Volta and Turing have no bf16 tensor cores.
    ("V100", "SXM2"): Gpu(None, 15.7, 300.0),
    ("V100", "PCIE"): Gpu(None, 14.0, 250.0),
    ("T4",): Gpu(None, 8.1, 70.0),
}
FP16_ONLY = {("V100", "SXM2"): 125.0, ("V100", "PCIE"): 112.0, ("T4",): 65.0}


def find_gpu(name: str) -> Gpu | None:
    """Figures of the device that torch calls `name`; None where it is not known for certain."""
    key = _key(name)
    return None if key is None else GPUS[key]


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device that torch calls `name` at bf16, fp16 or fp32; None where not known."""
    key = _key(name)
    if key is None:
        return None
    gpu = GPUS[key]
    peak = gpu.full if precision == "fp32" else gpu.half
    if peak is None and precision == "fp16":
        peak = FP16_ONLY[key]
    return None if peak is None else peak * 1e12


def _key(name: str) -> tuple[str, ...] | None:
    # Whole words for the model, so that an A100 is no A10 and an L40 no L4.
    words = set(name.replace("-", " ").split())
    return next((key for key in GPUS if key[0] in words and all(part in name for part in key)), None)
