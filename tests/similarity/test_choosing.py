"""Which implementation is chosen, why, and that no Triton is needed for torch's."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from neuclip_scale.normalizers import EmbeddingQueue, NormalizerPredictionNetwork, npn, queue
from neuclip_scale.similarity import PairFeatures, choosing, pair_logsumexp
from neuclip_scale.similarity.choosing import SIMILARITIES, VARIABLE, Kernels, choose, decide

GPU = torch.device("cuda", 0)


def pairs(dtype: torch.dtype = torch.float32) -> PairFeatures:
    features = torch.eye(4, 64, dtype=dtype)
    return PairFeatures.single(features, features)


def predict(dtype: torch.dtype) -> None:
    ones = torch.ones(4, dtype=dtype)
    NormalizerPredictionNetwork(64, 8).to(dtype)(torch.eye(4, 64, dtype=dtype), ones, 0.1)


def sum_over_queue(dtype: torch.dtype) -> None:
    entries, index = EmbeddingQueue(64, 8, rank=0, world_size=1).to(dtype), torch.arange(4)
    entries.push(pairs(dtype), index)
    entries.sums(pairs(dtype), torch.ones(1, dtype=dtype), index, torch.tensor([2.0]), tile_size=4)


class User(NamedTuple):
    """What has Triton kernels."""

    kernels: Kernels
    work: str
    """As the log names it."""
    run: Callable[[torch.dtype], object]


USERS = {
    "similarities": User(
        SIMILARITIES,
        "similarities of float32 features of width 64",
        lambda dtype: pair_logsumexp(pairs(dtype), torch.ones(1, dtype=dtype), exclude_diagonal=True),
    ),
    "NPN": User(npn.KERNELS, "NPN with float32 prototypes of width 64", predict),
    "queue": User(queue.KERNELS, "queue with float32 entries of width 64", sum_over_queue),
}
every_user = pytest.mark.parametrize("user", USERS.values(), ids=USERS)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choosing._choose.cache_clear()


@every_user
def test_a_cpu_takes_torch_and_says_so_once(user: User, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        user.run(torch.float32)
    assert choose(user.kernels, pairs().image).name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        f"{user.work} on cpu: torch (Triton is for GPUs, not for cpu)"
    ]


def test_torch_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert choose(SIMILARITIES, pairs().image) == ("torch", "NEUCLIP_SIMILARITY=torch")


@every_user
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        ("cuda", torch.float32, "NEUCLIP_SIMILARITY=cuda: no such implementation. Choose auto, torch or triton."),
        ("triton", torch.float32, "TRITON_INTERPRET=1 from the start. Unset it, or set it to torch."),
        ("triton", torch.float64, "take bf16, fp16 or fp32, not float64"),
    ],
)
def test_what_cannot_be_had_is_an_error(
    value: str, dtype: torch.dtype, message: str, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=r"^NEUCLIP_SIMILARITY=") as caught:
        user.run(dtype)
    assert message in str(caught.value)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU, answered as an H100 would; there is none here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choosing, "_failure", lambda *asked: "")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("hopper")
def test_a_gpu_takes_triton_where_it_is_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (128, 512, 640, 768, 1024, 1280):
            assert decide(SIMILARITIES, "auto", GPU, dtype, dim).name == "triton"
    assert "not float64" in decide(SIMILARITIES, "auto", GPU, torch.float64, 512).reason
    for dim in (32, 500):
        assert decide(SIMILARITIES, "auto", GPU, torch.bfloat16, dim) == (
            "torch",
            f"width {dim} is no multiple of 16 from 64 on",
        )
        assert decide(SIMILARITIES, "triton", GPU, torch.bfloat16, dim).name == "triton"
    assert decide(SIMILARITIES, "torch", GPU, torch.bfloat16, 512).name == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert decide(SIMILARITIES, "auto", GPU, torch.bfloat16, 512) == ("torch", "compute capability 7.5 is below 8.0")


@every_user
@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_triton_or_where_it_fails_takes_torch(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels that are asked for fail, and not others."""
    off = {user.kernels: "Triton's sums are off by 1.0 on this device"}
    monkeypatch.setattr(choosing, "_failure", lambda kernels, *_: off.get(kernels, ""))
    for other in USERS.values():
        choice = decide(other.kernels, "auto", GPU, torch.float32, 512)
        assert choice.name == ("torch" if other is user else "triton")
        assert choice.reason == off.get(other.kernels, "it passed its check on this device")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: None)
    assert decide(user.kernels, "auto", GPU, torch.float32, 512) == ("torch", "Triton is not installed")


@every_user
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU passes the check")
def test_a_check_that_cannot_run_is_a_reason_for_torch(user: User) -> None:
    """The real check, on a device that Triton cannot compile for here."""
    assert "Triton's kernels do not run here" in choosing._failure(user.kernels, GPU, torch.float32, 64)


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
