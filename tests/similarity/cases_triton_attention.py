"""The attention kernels against torch in float64. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_problems import DEVICE, HALVES

from neuclip_scale.models import triton_attention_check
from neuclip_scale.models.transformer import Attention
from neuclip_scale.models.triton_attention import HEAD, attention
from neuclip_scale.models.triton_attention_check import reference

INTERPRETED = DEVICE.type == "cpu"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("tokens", "heads", "scale"), [(197, 2, 1.0), (256, 1, 3.0), (129, 3, 0.1), (5, 1, 1.0)])
def test_values_and_gradients_are_those_of_float64(tokens: int, heads: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    qkv = (scale * torch.randn(2, tokens, 3 * heads * HEAD, generator=generator)).to(DEVICE, dtype)
    dout = torch.randn(2, tokens, heads * HEAD, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(3 * heads * HEAD, device=DEVICE, requires_grad=True)
    given, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = attention(given, bias, heads)[0], reference(exact, heads)
    dqkv, dbias = torch.autograd.grad(out, (given, bias), dout)
    (gradient,) = torch.autograd.grad(expected, exact, dout.double())
    assert (out.dtype, dqkv.dtype, dbias.dtype) == (dtype, dtype, torch.float32)
    assert_near(out, expected, dtype)
    assert_near(dqkv, gradient, dtype)
    assert_near(dbias, gradient.sum((0, 1)), dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Probabilities and their gradients are rounded before they are multiplied, so errors are those of the largest."""
    limit = 3 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)


def test_a_gradient_that_is_not_contiguous() -> None:
    qkv = torch.randn(2, 150, 3 * HEAD, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    bias, dout = torch.zeros(3 * HEAD, device=DEVICE), torch.randn(150, 2, HEAD, device=DEVICE, dtype=torch.bfloat16)
    out = attention(qkv, bias, 1)[0]
    (one,) = torch.autograd.grad(out, qkv, dout.transpose(0, 1), retain_graph=True)
    (other,) = torch.autograd.grad(out, qkv, dout.transpose(0, 1).contiguous())
    assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    INTERPRETED, reason="the interpreter's kernels cannot be compiled into a program"))])  # fmt: skip
def test_a_fused_layer_has_the_gradients_of_the_layer(compiled: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(2 * HEAD, 2, causal=False).to(DEVICE), torch.randn(3, 197, 2 * HEAD, device=DEVICE).bfloat16()
    torch.nn.init.normal_(layer.in_proj_bias)
    exact = copy.deepcopy(layer).double()

    def results(layer: Attention, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        out = function(x)
        return [out, *torch.autograd.grad(out.double().square().sum(), list(layer.parameters()))]

    expected = results(exact, exact, x.double())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        usual = results(layer, layer, x)
        layer.fused = True
        found = results(layer, torch.compile(layer, fullgraph=True) if compiled else layer, x)
    for one, other, truth in zip(found, usual, expected, strict=True):
        assert one.dtype == other.dtype
        # Half precision's rounding of `out`, which CPUs do not multiply the gradient with.
        assert (one - truth).norm() <= 2 * (other - truth).norm() + 0.02 * truth.norm()


def test_other_sequences_go_the_usual_way() -> None:
    layer = Attention(HEAD, 1, causal=False).to(DEVICE)
    layer.fused = True
    for tokens, dtype in ((128, torch.bfloat16), (257, torch.bfloat16), (197, torch.float32), (197, torch.float16)):
        x = torch.randn(2, tokens, HEAD, device=DEVICE, dtype=dtype)
        assert not layer._fits(x, None)
    assert layer._fits(torch.randn(2, 197, HEAD, device=DEVICE, dtype=torch.bfloat16), None)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_check_finds_nothing_and_finds_what_is_wrong(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_attention_check.disagreement(DEVICE, dtype, HEAD) == ""
    exact = triton_attention_check.reference
    monkeypatch.setattr(triton_attention_check, "reference", lambda qkv, heads: exact(qkv * 1.1, heads))
    assert "attention values are off" in triton_attention_check.disagreement(DEVICE, dtype, HEAD)
