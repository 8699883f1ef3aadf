"""Who updates an NPN, why, and that no Triton is needed for torch."""

from __future__ import annotations

import logging

import pytest
import torch

from neuclip_scale.normalizers import NormalizerPredictionNetwork, npn_choosing
from neuclip_scale.normalizers.npn_choosing import choose
from neuclip_scale.similarity import choosing
from neuclip_scale.similarity.choosing import VARIABLE, decide

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    npn_choosing._choose.cache_clear()


def test_a_cpu_takes_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    npn = NormalizerPredictionNetwork(64, 8)
    for _ in range(2):
        npn(torch.eye(4, 64), torch.ones(4), 0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "NPN with float32 prototypes of width 64 on cpu: torch (Triton is for GPUs, not for cpu)"
    ]


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
        NormalizerPredictionNetwork(64, 8).to(dtype)(torch.eye(4, 64, dtype=dtype), torch.ones(4, dtype=dtype), 0.1)
    assert message in str(caught.value)


def test_a_gpu_takes_triton_once_the_npns_own_check_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU is answered as an H100 would; the similarities' check is not the one that counts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choosing, "_failure", lambda device, dtype, dim: "of another kernel")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: object())
    assert decide("auto", GPU, torch.float32, 512, lambda device, dtype, dim: "").name == "triton"
    assert decide("auto", GPU, torch.float32, 512, lambda device, dtype, dim: "it is off") == ("torch", "it is off")
    assert decide("auto", GPU, torch.float32, 500, lambda device, dtype, dim: "").name == "torch"


def test_a_check_that_cannot_run_is_a_reason_for_torch() -> None:
    """The real check, on a device that Triton cannot compile for here."""
    if torch.cuda.is_available():
        pytest.skip("this GPU would pass")
    assert "Triton's kernels do not run here" in npn_choosing._failure(GPU, torch.float32, 64)
    assert choose(torch.zeros(8, 64)).name == "torch"
