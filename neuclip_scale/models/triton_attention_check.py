"""A small problem through both ways to attention: what a device must pass before Triton is chosen for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip_scale.models.triton_attention import HEAD, attention

_SEQUENCES, _HEADS = 2, 3
_PROBLEMS = ((197, False), (128, False), (77, True), (8, True))
"""Tokens, ragged and whole, and whether none sees those behind it."""


@torch.enable_grad()
def disagreement(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Where Triton's attention or its gradients differ from torch's in float64 by more than rounding; empty if nowhere.
    `dim` is HEAD. No collective.
    """
    generator = torch.Generator().manual_seed(0)
    for length, causal in _PROBLEMS:
        qkv = (1.5 * torch.randn(_SEQUENCES, length, 3 * _HEADS * HEAD, generator=generator)).to(device, dtype)
        dout = torch.randn(_SEQUENCES, length, _HEADS * HEAD, generator=generator).to(device, dtype)
        bias = torch.zeros(3 * _HEADS * HEAD, device=device, requires_grad=True)
        given, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
        out, expected = attention(given, bias, _HEADS, causal)[0], reference(exact, _HEADS, causal)
        dqkv, dbias = torch.autograd.grad(out, (given, bias), dout)
        (gradient,) = torch.autograd.grad(expected, exact, dout.double())
        for what, one, other in (
            ("values", out, expected),
            ("gradients", dqkv, gradient),
            ("bias gradients", dbias, gradient.sum((0, 1))),
        ):
            error, limit = (one - other).abs().max(), 4 * torch.finfo(dtype).eps * other.abs().max()
            if not bool(error <= limit):  # NaN too
                return f"Triton's attention {what} are off by {float(error.detach()):.1e} on this device"
    return ""


def reference(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    """[N, L, 3 width] -> [N, L, width]."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
