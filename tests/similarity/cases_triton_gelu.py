"""The GELU's kernels against torch's GELU in float64. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_problems import DEVICE, DTYPES

from neuclip_scale.models import transformer, triton_gelu, triton_gelu_check
from neuclip_scale.models.transformer import LinearGELU, gelu
from neuclip_scale.models.triton_gelu import CHUNK_ROWS, bias_gelu

INTERPRETED = DEVICE.type == "cpu"


def fused(quick: bool) -> Any:
    return lambda x, bias: bias_gelu(x, bias, quick)


def usual(quick: bool) -> Any:
    return lambda x, bias: gelu(x + bias, quick=quick)


def gradients(function: Any, x: torch.Tensor, bias: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    x, bias = (tensor.detach().clone().requires_grad_() for tensor in (x, bias))
    out = function(x, bias)
    return [out.detach(), *torch.autograd.grad(out, (x, bias), dout)]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 5, 272), (CHUNK_ROWS, 256), (2, CHUNK_ROWS + 1, 80)])
def test_activations_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], dtype: torch.dtype, quick: bool
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x = (4 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
    dout = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(shape[-1], generator=generator).to(DEVICE)
    found = gradients(fused(quick), x, bias, dout)
    expected = gradients(usual(quick), x.double(), bias.double(), dout.double())
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32]
    eps = torch.finfo(dtype).eps
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=1e-5 if quick else 5e-7)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=2e-6 * len(x.view(-1, shape[-1])))


@pytest.mark.parametrize("quick", [False, True])
def test_far_from_zero_it_is_zero_or_its_argument(quick: bool) -> None:
    x = torch.tensor([-1e4, -40.0, -6.0, 0.0, 6.0, 40.0, 1e4], device=DEVICE)[:, None].expand(7, 64)
    found, slope, _ = gradients(fused(quick), x, torch.zeros(64, device=DEVICE), torch.ones_like(x))
    torch.testing.assert_close(found, gelu(x, quick=quick), rtol=1e-6, atol=1e-6)
    expected = torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1], device=DEVICE)[:, None].expand(7, 64)
    torch.testing.assert_close(slope, expected, rtol=0, atol=5e-4 if quick else 1e-6)


def test_a_gradient_that_is_not_contiguous() -> None:
    x, dout = torch.randn(2, 20, 64, device=DEVICE).unbind()
    bias = torch.randn(64, device=DEVICE)
    expected = gradients(fused(False), x, bias, dout)
    for one, other in zip(gradients(fused(False), x, bias, dout.T.contiguous().T), expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of which dtypes kernels ran, and all are taken."""
    found: list[torch.dtype] = []
    launch = triton_gelu._launch

    def noting(kernel: Any, rows: int, options: dict[str, int], quick: bool, out: Any, *arguments: Any) -> None:
        found.append(out.dtype)
        launch(kernel, rows, options, quick, out, *arguments)

    monkeypatch.setattr(triton_gelu, "_launch", noting)
    monkeypatch.setattr(transformer, "FUSED_DTYPES", DTYPES)
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_a_fused_layer_has_the_gradients_of_the_layer(autocast: bool, launches: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    layer, x = LinearGELU(48, 192, quick=False).to(DEVICE), torch.randn(3, 50, 48, device=DEVICE)
    results = []
    for fused in (False, True):
        layer.fused = fused
        layer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.float().square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        results.append((out, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2 if autocast else 1e-4, atol=2e-1 if autocast else 1e-3)
    assert launches == 2 * [torch.bfloat16 if autocast else torch.float32]


def test_other_dtypes_go_the_usual_way() -> None:
    layer, x = LinearGELU(48, 192, quick=False).to(DEVICE), torch.randn(5, 48, device=DEVICE)
    expected = layer(x)
    layer.fused = True
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be compiled into a program")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_the_same(dynamic: bool, launches: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    layer = LinearGELU(64, 256, quick=dynamic).to(DEVICE)
    layer.fused = True
    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for rows in (50, 300):
        x = torch.randn(rows, 64, device=DEVICE)
        expected = torch.autograd.grad(layer(x).square().sum(), [layer.weight, layer.bias])
        found = torch.autograd.grad(compiled(x).square().sum(), [layer.weight, layer.bias])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_finds_nothing_and_finds_what_is_wrong(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_gelu_check.disagreement(DEVICE, dtype, 64) == ""
    monkeypatch.setattr(triton_gelu_check, "bias_gelu", lambda x, bias, quick: gelu(x + bias.to(x) / 2, quick=quick))
    assert "activations are off" in triton_gelu_check.disagreement(DEVICE, dtype, 64)
