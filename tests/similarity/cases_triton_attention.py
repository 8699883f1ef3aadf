"""The attention kernels against torch in float64. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_problems import DEVICE, HALVES

from neuclip_scale.models import triton_attention_check
from neuclip_scale.models.packing import Packing, pack
from neuclip_scale.models.transformer import Attention
from neuclip_scale.models.triton_attention import HEAD, attention
from neuclip_scale.models.triton_attention_check import reference

INTERPRETED = DEVICE.type == "cpu"
PRECISIONS = HALVES[:1] if INTERPRETED else HALVES


PROBLEMS = [  # tokens, heads, causal, scale
    (197, 2, False, 1.0), (256, 1, False, 3.0), (257, 1, False, 1.0), (129, 3, False, 0.1), (5, 1, False, 1.0),
    (77, 2, True, 1.0), (77, 1, False, 1.0), (8, 1, True, 1.0), (64, 1, True, 3.0), (72, 2, True, 1.0),
    (112, 1, True, 1.0), (577, 1, False, 1.0),
]  # fmt: skip


# The interpreter takes seconds for many tokens: of these, one precision.
CASES = [
    pytest.param(*problem, dtype, marks=pytest.mark.long if problem[0] > 500 else ())
    for problem in PROBLEMS
    for dtype in (HALVES if problem[0] < 128 else PRECISIONS)
]


@pytest.mark.parametrize(("tokens", "heads", "causal", "scale", "dtype"), CASES)
def test_values_and_gradients_are_those_of_float64(
    tokens: int, heads: int, causal: bool, scale: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    qkv = (scale * torch.randn(2, tokens, 3 * heads * HEAD, generator=generator)).to(DEVICE, dtype)
    dout = torch.randn(2, tokens, heads * HEAD, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(3 * heads * HEAD, device=DEVICE, requires_grad=True)
    given, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = attention(given, bias, heads, causal)[0], reference(exact, heads, causal)
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


@pytest.mark.parametrize("tokens", [17, 64, 77, 197])
def test_scores_far_below_zero(tokens: int) -> None:
    """Where there are no tokens keys are zero, and a score of zero is more than any that there is."""
    q, k, v = 4.0, -4.0, torch.randn(1, tokens, HEAD, generator=torch.Generator().manual_seed(0))
    qkv = torch.cat([torch.full((1, tokens, HEAD), q), torch.full((1, tokens, HEAD), k), v], dim=2)
    qkv = qkv.to(DEVICE, torch.bfloat16).requires_grad_()
    bias = torch.zeros(3 * HEAD, device=DEVICE, requires_grad=True)
    out, expected = (
        attention(qkv, bias, 1, False)[0],
        reference(exact := qkv.detach().double().requires_grad_(), 1, False),
    )
    dqkv, dbias = torch.autograd.grad(out.sum(), (qkv, bias))
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    for found, truth, limit in ((out, expected, 0.02), (dqkv, gradient, 0.1), (dbias, gradient.sum((0, 1)), 0.5)):
        torch.testing.assert_close(found.double(), truth.detach(), rtol=0, atol=limit)


def test_a_gradient_that_is_not_contiguous() -> None:
    qkv = torch.randn(2, 150, 3 * HEAD, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    bias, dout = torch.zeros(3 * HEAD, device=DEVICE), torch.randn(150, 2, HEAD, device=DEVICE, dtype=torch.bfloat16)
    out = attention(qkv, bias, 1, False)[0]
    (one,) = torch.autograd.grad(out, qkv, dout.transpose(0, 1), retain_graph=True)
    (other,) = torch.autograd.grad(out, qkv, dout.transpose(0, 1).contiguous())
    assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    INTERPRETED, reason="the interpreter's kernels cannot be compiled into a program"))])  # fmt: skip
def test_a_fused_layer_has_the_gradients_of_the_layer(compiled: bool, packed: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(2 * HEAD, 2, causal=packed).to(DEVICE)
    torch.nn.init.normal_(layer.in_proj_bias)
    exact = copy.deepcopy(layer).double()
    batches = [packed_captions(lengths) for lengths in ((8, 9, 20, 33), (7, 30, 60, 77))] if packed else [pictures()]

    def results(layer: Attention, function: Callable[..., Tensor], x: Tensor, packing: Packing | None) -> list[Tensor]:
        out = function(x, None, packing)
        slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out, *torch.autograd.grad(out, list(layer.parameters()), slopes)]

    function = torch.compile(layer, fullgraph=True, dynamic=packed) if compiled else layer
    for x, packing in batches:
        expected = results(exact, exact, x.double(), packing)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            layer.fused = False
            usual = results(layer, layer, x, packing)
            layer.fused = True
            found = results(layer, function, x, packing)
        for one, other, truth in zip(found, usual, expected, strict=True):
            assert one.dtype == other.dtype
            # Half precision's rounding of `out`, which CPUs do not multiply the gradient with.
            assert (one - truth).norm() <= 2 * (other - truth).norm() + 0.005 * truth.norm()


def pictures() -> tuple[Tensor, None]:
    return torch.randn(2, 197, 2 * HEAD, device=DEVICE).bfloat16(), None


def packed_captions(lengths: tuple[int, ...]) -> tuple[Tensor, Packing]:
    """In fp32, which the text tower's tokens are."""
    packing = pack(lengths * 2, 77, DEVICE, alike=True)
    assert packing is not None
    return torch.randn(sum(a * b for a, b in packing.rectangles), 2 * HEAD, device=DEVICE), packing


def test_other_sequences_go_the_usual_way() -> None:
    layer = Attention(HEAD, 1, causal=False).to(DEVICE)
    layer.fused = True
    for tokens, dtype, fits in (
        (197, torch.bfloat16, True),
        (578, torch.bfloat16, False),
        (197, torch.float32, False),
        (197, torch.float16, False),
    ):
        x = torch.randn(2, tokens, HEAD, device=DEVICE, dtype=dtype)
        qkv, fused = layer.to(dtype)._project(x, None)
        assert fused is fits
        assert qkv.dtype == dtype
        # The kernel gives the bias's gradient, the product must not give it too.
        assert (torch.autograd.grad(qkv.sum(), layer.in_proj_bias, allow_unused=True)[0] is None) is fused


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.long
def test_the_check_finds_nothing_and_finds_what_is_wrong(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_attention_check.disagreement(DEVICE, dtype, HEAD) == ""
    exact = triton_attention_check.reference
    monkeypatch.setattr(triton_attention_check, "reference", lambda qkv, heads, causal: exact(qkv * 1.1, heads, causal))
    assert "attention values are off" in triton_attention_check.disagreement(DEVICE, dtype, HEAD)
