"""GPUs by the names that torch gives them."""

from __future__ import annotations

import pytest

from neuclip_scale.telemetry.devices import find_gpu, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 700),
        ("NVIDIA H100 PCIe", 756, 350),
        ("NVIDIA H100 NVL", 835.5, 400),
        ("NVIDIA H200", 989.5, 700),
        ("NVIDIA A100-SXM4-80GB", 312, 400),
        ("NVIDIA A100 80GB PCIe", 312, 300),
        ("NVIDIA A100-PCIE-40GB", 312, 250),
        ("NVIDIA A10G", 70, 300),
        ("NVIDIA A10", 125, 150),
        ("NVIDIA L40S", 362, 350),
        ("NVIDIA L4", 121, 72),
        ("Tesla V100-SXM2-32GB", None, 300),
    ],
)
def test_known_names(name: str, bf16: float | None, watts: float) -> None:
    gpu = find_gpu(name)
    assert gpu is not None
    assert (gpu.bf16, gpu.watts) == (bf16, watts)
    assert peak_flops(name, "bf16") == (None if bf16 is None else bf16 * 1e12)
    assert peak_flops(name, "fp32") == gpu.fp32 * 1e12
    assert peak_flops(name, "tf32") == (None if bf16 is None else bf16 * 0.5e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090",
        "NVIDIA A1000",
        "NVIDIA L40",
        "NVIDIA H100 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "",
    ],
)
def test_an_unknown_name_has_no_figures(name: str) -> None:
    assert find_gpu(name) is None
    assert peak_flops(name, "bf16") is None
