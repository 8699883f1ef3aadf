"""A small problem through both ways to an MLP's GELU: what a device must pass before Triton is chosen for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuclip_scale.models.transformer import gelu
from neuclip_scale.models.triton_gelu import bias_gelu

_ROWS = 300  # ragged, and of several chunks


@torch.enable_grad()
def disagreement(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Where Triton's activations and gradients of a layer `dim` wide differ from torch's in float64 by more than
    rounding; empty if nowhere. No collective.
    """
    generator = torch.Generator().manual_seed(0)
    x, dout = (3 * torch.randn(2, _ROWS, dim, generator=generator)).to(device, dtype)
    bias = torch.randn(dim, generator=generator).to(device)
    for quick in (False, True):
        found = _with_gradients(lambda x, bias, quick=quick: bias_gelu(x, bias, quick), x, bias, dout)
        exact = (tensor.double() for tensor in (x, bias, dout))
        expected = _with_gradients(lambda x, bias, quick=quick: gelu(x + bias, quick=quick), *exact)
        for what, one, other in zip(("activations", "gradients", "bias gradients"), found, expected, strict=True):
            error, limit = (one - other).abs().max(), 4 * torch.finfo(dtype).eps * other.abs().max()
            if not bool(error <= limit):  # NaN too
                return f"Triton's GELU {what} are off by {float(error):.1e} on this device"
    return ""


def _with_gradients(function: Callable[..., Tensor], x: Tensor, bias: Tensor, dout: Tensor) -> list[Tensor]:
    x, bias = (tensor.detach().requires_grad_() for tensor in (x, bias))
    out = function(x, bias)
    return [each.double() for each in (out.detach(), *torch.autograd.grad(out, (x, bias), dout))]
