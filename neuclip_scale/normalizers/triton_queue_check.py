"""A small problem through both ways to sum over a queue: what a device must pass before Triton is chosen for it."""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import normalize

from neuclip_scale.normalizers import triton_queue
from neuclip_scale.normalizers.own_entries import OwnEntries
from neuclip_scale.normalizers.queue import EmbeddingQueue
from neuclip_scale.normalizers.rounded import Rounded
from neuclip_scale.similarity.pairs import PairFeatures

SUMS = 1e-2
"""Largest difference of a log-sum that is rounding. The features are bf16's numbers, so that their products are exact
however fp32 is multiplied; for bf16 products the exponentials are rounded by 4e-3."""
_ANCHORS, _ENTRIES = 200, 300  # ragged for every block
_SCALE = 20.0


@torch.no_grad()
def disagreement(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Where Triton's sums differ from torch's in float64 by more than rounding; empty if nowhere. No collective."""
    generator = torch.Generator().manual_seed(0)

    def features(like: torch.Tensor | float = 0.0) -> torch.Tensor:
        noise = torch.randn(_ANCHORS, dim, generator=generator) / dim**0.5
        return normalize(like + noise, dim=1).bfloat16().float()

    # Entries stand by their own anchors, so that one that is not left out is seen.
    image, text = features(), features()
    own = torch.randperm(_ENTRIES, generator=generator) % _ANCHORS
    past = PairFeatures.single(features(text)[own].to(device), features(image)[own].to(device))
    queue = EmbeddingQueue(dim, _ENTRIES + 10, rank=0, world_size=1).to(device, dtype)
    queue.push(past, own.to(device))
    pairs, exact = PairFeatures.single(image.to(device), text.to(device)), copy.deepcopy(queue).double()
    scale, index = torch.full((1,), _SCALE, device=device), torch.arange(_ANCHORS, device=device)
    horizons = torch.tensor([4.0, 32.0, 256.0, torch.inf], device=device)
    positives, weights = pairs.world_positives(), queue.weights_of(horizons)
    own_entries = OwnEntries(queue.index[: len(weights)], index)
    sums = triton_queue.FusedSums(positives, scale, own_entries, weights, triton_queue.Limits(programs=4))
    expected = exact.sweep(
        (pairs.world_image.double(), pairs.world_text.double()), positives.double(), scale.double(), index,
        exact.weights_of(horizons.double()), _ANCHORS,
    )  # fmt: skip
    for side, (what, anchors, theirs) in enumerate(
        (("image", pairs.world_image, queue.text), ("text", pairs.world_text, queue.image))
    ):
        found = sums.log_sums(anchors, theirs, Rounded())
        error = (found - expected[:, side]).abs().max()
        if not bool(error <= SUMS):  # NaN too
            return f"Triton's sums of {what} anchors over a queue are off by {float(error):.1e} on this device"
    return ""
