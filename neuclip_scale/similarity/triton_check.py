"""A small problem through both implementations: what a device must pass before Triton is chosen for it."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from neuclip_scale.similarity import sigmoid, tiled, triton_sweeps
from neuclip_scale.similarity.pairs import PairFeatures

SUMS, GRADIENTS = 2e-4, 2e-2
"""Largest difference that is rounding: of a log-sum-exp, and of a gradient relative to the largest. The features are
bf16's numbers in every dtype, so that products are exact however fp32 is multiplied; weights are rounded by 4e-3."""
_SIZE, _OWN = 200, slice(30, 171)  # ragged for every block


def disagreement(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Where the two differ by more than rounding, in words; empty if nowhere. Some 200 pairs, whole and as a rank's."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(_SIZE, dim, generator=generator), dim=1)
    text = normalize(image + torch.randn(_SIZE, dim, generator=generator) / dim**0.5, dim=1)
    image, text = (side.bfloat16().to(device, dtype) for side in (image, text))
    for pairs in (PairFeatures.single(image, text), PairFeatures(image[_OWN], text[_OWN], image, text, _OWN.start)):
        off = sums_and_gradients(pairs)
        if off:
            return off
    return ""


@torch.no_grad()
def sums_and_gradients(pairs: PairFeatures) -> str:
    """Where Triton's results of `pairs` differ from torch's in float64; empty if nowhere."""
    exact = pairs.to(torch.float64)
    scale, bias = (torch.tensor([value], device=pairs.image.device) for value in (5.0, -4.0))
    shifts = [torch.full((pairs.global_size,), shift, device=scale.device) for shift in (4.0, 5.0)]
    found: list[tuple[str, torch.Tensor, torch.Tensor, float]] = []

    def compare(what: str, actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], limit: float) -> None:
        found.extend((what, a, e, limit) for a, e in zip(actual, expected, strict=True))

    for exclude in (False, True):
        compare(
            "sums",
            triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=exclude),
            tiled.pair_logsumexp(exact, scale.double(), exclude_diagonal=exclude),
            SUMS,
        )
        compare(
            "gradients",
            triton_sweeps.pair_gradients(pairs, scale, shifts[0], shifts[1], exclude_diagonal=exclude),
            tiled.pair_gradients(
                exact, scale.double(), shifts[0].double(), shifts[1].double(), exclude_diagonal=exclude
            ),
            GRADIENTS,
        )
    compare(
        "sigmoids",
        triton_sweeps.pair_sigmoids(pairs, scale, bias),
        sigmoid.pair_sigmoids(exact, scale.double(), bias.double()),
        GRADIENTS,
    )
    for what, actual, expected, limit in found:
        error = (actual - expected).abs().max() / (1.0 if what == "sums" else expected.abs().max())
        if not bool(error <= limit):  # NaN too
            return f"Triton's {what} are off by {float(error):.1e} on this device"
    return ""
