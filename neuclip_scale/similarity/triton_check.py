"""A small problem through both implementations: what a device must pass before Triton is chosen for it."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from neuclip_scale.similarity import sigmoid, tiled, triton_sweeps
from neuclip_scale.similarity.pairs import PairFeatures

SUMS, GRADIENTS = 2e-3, 2e-2
"""Largest difference that is rounding: of a log-sum-exp, and of a gradient relative to the largest. TF32 and bf16
features are good for about 1e-4 and 4e-3; a wrong index or mask is off by far more."""
_SIZE, _OWN = 200, slice(30, 171)  # ragged for every block


def disagreement(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Where the two differ by more than rounding, in words; empty if nowhere. Some 200 pairs, whole and as a rank's."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(_SIZE, dim, generator=generator), dim=1)
    text = normalize(image + torch.randn(_SIZE, dim, generator=generator) / dim**0.5, dim=1)
    image, text = image.to(device, dtype), text.to(device, dtype)
    for pairs in (PairFeatures.single(image, text), PairFeatures(image[_OWN], text[_OWN], image, text, _OWN.start)):
        off = sums_and_gradients(pairs)
        if off:
            return off
    return ""


@torch.no_grad()
def sums_and_gradients(pairs: PairFeatures) -> str:
    """Where Triton's results of `pairs` differ from torch's in float64; empty if nowhere."""
    exact = pairs.to(torch.float64)
    scale, bias = pairs.image.new_tensor([20.0], dtype=torch.float32), pairs.image.new_tensor([-6.0]).float()
    shifts = [torch.full((pairs.global_size,), shift, device=scale.device) for shift in (19.0, 20.0)]
    pairs_of: list[tuple[str, torch.Tensor, torch.Tensor, float]] = []

    def compare(what: str, actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], limit: float) -> None:
        pairs_of.extend((what, a, e, limit) for a, e in zip(actual, expected, strict=True))

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
    for what, actual, expected, limit in pairs_of:
        error = (actual - expected).abs().max() / (1.0 if what == "sums" else expected.abs().max())
        if not bool(error <= limit):  # NaN too
            return f"Triton's {what} are off by {float(error):.1e} on this device"
    return ""
