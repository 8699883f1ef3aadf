"""The shared transformer: against PyTorch's attention, with checkpointing, dropout and mixed precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuclip_scale.models.transformer import Attention, LayerNorm, LinearGELU, Transformer


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_pytorchs(causal: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3, causal=causal), nn.MultiheadAttention(24, 3, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 24)
    mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("causal", "at"), [(False, 0), (True, 2), (False, [3, 0, 4]), (True, [3, 0, 4])])
def test_one_token_of_each_sequence_is_what_all_would_give(
    causal: bool, at: int | list[int], checkpointing: bool
) -> None:
    torch.manual_seed(0)
    model = Transformer(16, 3, 2, causal=causal).double()
    model.grad_checkpointing = checkpointing
    places, direction = torch.tensor([at] * 3 if isinstance(at, int) else at), torch.randn(3, 16).double()
    found = []
    for one in (False, True):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        y = model(x, at if isinstance(at, int) else places) if one else model(x)[torch.arange(3), places]
        model.zero_grad()
        (y * direction).sum().backward()
        found.append([y, x.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width = 10: not a multiple of heads = 3"):
        Attention(10, 3, causal=False)


def _gradients(model: Transformer, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    torch.manual_seed(0)
    model, x = Transformer(16, 3, 2, causal=True, dropout=dropout), torch.randn(2, 5, 16)
    plain = _gradients(model, x)
    model.grad_checkpointing = True
    recomputed = _gradients(model, x)
    assert len(plain) == len(list(model.parameters()))
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_checkpointing_runs_every_block_again_in_the_backward_pass() -> None:
    model, calls = Transformer(16, 3, 2), []
    model.grad_checkpointing = True
    for block in model.resblocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    y = model(torch.randn(1, 4, 16, requires_grad=True))
    assert len(calls) == 3
    y.sum().backward()
    assert len(calls) == 6


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model, x = Transformer(16, 2, 2, dropout=0.5), torch.randn(2, 5, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_layer_norm_is_computed_in_float32() -> None:
    norm = LayerNorm(512)
    x = (torch.randn(4, 512) * 1e-2 + 100).bfloat16()
    exact = nn.functional.layer_norm(x.double(), (512,)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(norm.bfloat16()(x), exact)


@pytest.mark.parametrize("quick", [False, True])
def test_a_linear_layer_with_its_gelu(quick: bool) -> None:
    layer, x = LinearGELU(5, 7, quick=quick), torch.randn(4, 5)
    inside = nn.functional.linear(x, layer.weight, layer.bias)
    expected = inside / (1 + torch.exp(-1.702 * inside)) if quick else nn.GELU()(inside)
    torch.testing.assert_close(layer(x), expected)
