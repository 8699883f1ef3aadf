"""A small problem through both ways to update an NPN: what a device must pass before Triton is chosen for it."""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import normalize

from neuclip_scale.normalizers import triton_npn
from neuclip_scale.normalizers.npn import ADAGRAD_EPS, NormalizerPredictionNetwork

STEPS, PREDICTIONS = 5e-2, 5e-2
"""Largest difference that is rounding: of a prototype's way, relative to the largest, and of a prediction. Operands in
bf16 (`torch.set_float32_matmul_precision`) are rounded by 4e-3, and the temperature makes more of it."""
_ANCHORS, _PROTOTYPES = 200, 300  # ragged for every block
_RATE, _TAU = 0.01, 0.1


@torch.no_grad()
def disagreement(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Where Triton's updates and predictions differ from torch's in float64 by more than rounding; empty if nowhere."""
    generator = torch.Generator().manual_seed(0)
    npn = NormalizerPredictionNetwork(dim, _PROTOTYPES)
    npn.weight.copy_(normalize(torch.randn(_PROTOTYPES, dim, generator=generator), dim=1))
    npn.squares.fill_(1e-4)  # from 0 on the first step would be the gradient's sign, which rounding can change
    npn.prototype_index.copy_(torch.arange(_PROTOTYPES) % 7)
    npn.to(device, dtype)
    anchors = normalize(torch.randn(_ANCHORS, dim, generator=generator), dim=1).to(device, dtype)
    positives, target = torch.full_like(anchors[:, 0], 0.3), torch.full_like(anchors[:, 0], -4.0)
    index = torch.arange(_ANCHORS, device=device)
    exact, before = copy.deepcopy(npn).double(), npn.weight.double()
    wide = anchors.double(), positives.double(), _TAU, index
    tiles = exact.tiles(*wide, tile_size=_ANCHORS)
    batch, total = triton_npn.FusedBatch(npn, anchors, positives, _TAU, index), torch.empty_like(npn.weight)
    for _ in range(2):  # without collectives: another rank may have failed
        exact.descend(exact.local_gradient(tiles, target.double(), _ANCHORS), _RATE)
        batch.local_gradient(target, total, _ANCHORS)
        batch.descend(total, _RATE, ADAGRAD_EPS)
    way = exact.weight - before
    steps = (npn.weight - exact.weight).abs().max() / way.abs().max()
    predictions = (batch.predict() - exact(*wide)).abs().max()
    for what, error, limit in (("updates", steps, STEPS), ("predictions", predictions, PREDICTIONS)):
        if not bool(error <= limit):  # NaN too
            return f"Triton's {what} of an NPN are off by {float(error):.1e} on this device"
    return ""
