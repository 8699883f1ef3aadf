"""Which implementation is chosen, why, and that no Triton is needed for torch's."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from neuclip_scale.similarity import PairFeatures, choosing, pair_logsumexp
from neuclip_scale.similarity.choosing import VARIABLE, choose, decide

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def pairs(dtype: torch.dtype = torch.float32, dim: int = 64) -> PairFeatures:
    features = torch.eye(4, dim, dtype=dtype)
    return PairFeatures.single(features, features)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choosing._choose.cache_clear()


def test_a_cpu_takes_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert choose(pairs()).name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "similarities of float32 features of width 64 on cpu: torch (Triton is for GPUs, not for cpu)"
    ]


def test_torch_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert choose(pairs()) == ("torch", "NEUCLIP_SIMILARITY=torch")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        ("cuda", torch.float32, "NEUCLIP_SIMILARITY=cuda: no such implementation. Choose auto, torch or triton."),
        ("triton", torch.float32, "TRITON_INTERPRET=1 from the start. Unset it, or set it to torch."),
        ("triton", torch.float64, "take bf16, fp16 or fp32, not float64"),
    ],
)
def test_what_cannot_be_had_is_an_error(
    value: str, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=r"^NEUCLIP_SIMILARITY=") as caught:
        pair_logsumexp(pairs(dtype), torch.ones(1), exclude_diagonal=True)
    assert message in str(caught.value)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU, answered as an H100 would; there is none here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choosing, "_failure", lambda device, dtype, dim: "")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("hopper")
def test_a_gpu_takes_triton_where_it_is_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (128, 512, 640, 768, 1024, 1280):
            assert decide("auto", GPU, dtype, dim).name == "triton"
    assert "not float64" in decide("auto", GPU, torch.float64, 512).reason
    for dim in (32, 500):
        assert decide("auto", GPU, torch.bfloat16, dim) == ("torch", f"width {dim} is no multiple of 16 from 64 on")
        assert decide("triton", GPU, torch.bfloat16, dim).name == "triton"
    assert decide("torch", GPU, torch.bfloat16, 512).name == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert decide("auto", GPU, torch.bfloat16, 512) == ("torch", "compute capability 7.5 is below 8.0")


@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_triton_or_where_it_fails_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_failure", lambda device, dtype, dim: "Triton's sums are off by 1.0 on this device")
    assert decide("auto", GPU, torch.bfloat16, 512) == ("torch", "Triton's sums are off by 1.0 on this device")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: None)
    assert decide("auto", GPU, torch.bfloat16, 512) == ("torch", "Triton is not installed")


def test_a_check_that_cannot_run_is_a_reason_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real check, on a device that Triton cannot compile for here."""
    if torch.cuda.is_available():
        pytest.skip("this GPU would pass")
    assert "Triton's kernels do not run here" in choosing._failure(GPU, torch.bfloat16, 64)


def test_losses_work_where_no_triton_can_be_imported() -> None:
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed: importing it raises ImportError
import torch
from neuclip_scale import create_loss
features = torch.nn.functional.normalize(torch.randn(6, 64), dim=1).requires_grad_()
for name in ("openclip", "siglip", "neuclip"):
    create_loss(name, embed_dim=64)(features, features.detach(), torch.tensor([10.0])).backward()
assert not [name for name in sys.modules if name.startswith("neuclip_scale.similarity.triton")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
