"""Peak arithmetic and board power of GPUs, from their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Dense peaks in TFLOP/s, and board power."""

    bf16: float | None
    """On tensor cores, fp32 accumulation, without sparsity; None where they do not take it."""
    fp16: float
    fp32: float
    """Without TF32, as torch multiplies unless told otherwise."""
    watts: float
    """Maximum power of the board."""


# NVIDIA's data sheets "H100 Tensor Core GPU" (SXM, PCIe; NVL), "H200 Tensor Core GPU" (SXM, NVL), "A100 Tensor Core
# GPU", "A10 Tensor Core GPU" (the A10G: AWS's description of its G5 instances), "L40S", "L4 Tensor Core GPU", "V100",
# "T4"; tensor-core figures that they give with sparsity are halved. The first part of a key is a word of torch's name
# of the device, the second is anywhere in it; the first key that fits counts.
GPUS: dict[tuple[str, str], Gpu] = {
    ("H200", "NVL"): Gpu(835.5, 835.5, 60.0, 600.0),
    ("H200", ""): Gpu(989.5, 989.5, 67.0, 700.0),
    ("H100", "PCIe"): Gpu(756.0, 756.0, 51.0, 350.0),
    ("H100", "NVL"): Gpu(835.5, 835.5, 60.0, 400.0),
    ("H100", "HBM3"): Gpu(989.5, 989.5, 67.0, 700.0),
    ("A100", "SXM"): Gpu(312.0, 312.0, 19.5, 400.0),
    ("A100", "80GB PCIe"): Gpu(312.0, 312.0, 19.5, 300.0),
    ("A100", "PCIE"): Gpu(312.0, 312.0, 19.5, 250.0),
    ("L40S", ""): Gpu(362.0, 362.0, 91.6, 350.0),
    ("A10G", ""): Gpu(70.0, 70.0, 35.0, 300.0),
    ("A10", ""): Gpu(125.0, 125.0, 31.2, 150.0),
    ("L4", ""): Gpu(121.0, 121.0, 30.3, 72.0),
    ("V100", "SXM2"): Gpu(None, 125.0, 15.7, 300.0),
    ("V100", "PCIE"): Gpu(None, 112.0, 14.0, 250.0),
    ("T4", ""): Gpu(None, 65.0, 8.1, 70.0),
}


def find_gpu(name: str) -> Gpu | None:
    """Figures of the device that torch calls `name`; None where they are not known for certain."""
    words = set(name.replace("-", " ").split())  # whole words: an A100 is no A10, an L40 no L4
    if "MIG" in words:  # a part of the device, under the name of the whole
        return None
    return next((gpu for (model, part), gpu in GPUS.items() if model in words and part in name), None)


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device that torch calls `name` at bf16, tf32, fp16 or fp32; None where not known."""
    gpu = find_gpu(name)
    if gpu is None:
        return None
    tf32 = None if gpu.bf16 is None else gpu.bf16 / 2  # on all of these
    peak = {"bf16": gpu.bf16, "tf32": tf32, "fp16": gpu.fp16, "fp32": gpu.fp32}[precision]
    return None if peak is None else peak * 1e12
