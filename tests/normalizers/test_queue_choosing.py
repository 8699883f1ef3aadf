"""Who sums over a queue, why, and that no Triton is needed for torch."""

from __future__ import annotations

import logging

import pytest
import torch

from neuclip_scale.normalizers import EmbeddingQueue, queue_choosing
from neuclip_scale.similarity import PairFeatures, choosing
from neuclip_scale.similarity.choosing import VARIABLE

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    queue_choosing._choose.cache_clear()


def sums(dtype: torch.dtype = torch.float32) -> None:
    queue, features = EmbeddingQueue(64, 8, rank=0, world_size=1).to(dtype), torch.eye(4, 64, dtype=dtype)
    pairs, index = PairFeatures.single(features, features), torch.arange(4)
    queue.push(pairs, index)
    queue.sums(pairs, torch.ones(1, dtype=dtype), index, torch.tensor([2.0]), tile_size=4)


def test_a_cpu_takes_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        sums()
    assert [record.getMessage() for record in caplog.records] == [
        "queue with float32 entries of width 64 on cpu: torch (Triton is for GPUs, not for cpu)"
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
        sums(dtype)
    assert message in str(caught.value)


def test_a_gpu_takes_triton_once_the_queues_own_check_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU is answered as an H100 would; the similarities' check is not the one that counts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choosing, "_failure", lambda device, dtype, dim: "of another kernel")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: object())
    for failure, name in (("", "triton"), ("it is off", "torch")):
        monkeypatch.setattr(queue_choosing, "_failure", lambda device, dtype, dim, found=failure: found)
        queue_choosing._choose.cache_clear()
        choice = queue_choosing._choose("auto", GPU, torch.float32, 512)
        assert choice.name == name
        assert choice.reason == (failure or "it passed its check on this device")


def test_a_check_that_cannot_run_is_a_reason_for_torch() -> None:
    """The real check, on a device that Triton cannot compile for here."""
    if torch.cuda.is_available():
        pytest.skip("this GPU would pass")
    assert "Triton's kernels do not run here" in queue_choosing._failure(GPU, torch.float32, 64)
