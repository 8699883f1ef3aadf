"""The exact log-normalizers of the global contrastive loss, and how far an estimate is from them.

    a1_i = log(eps + 1/(n-1) sum_{j != i} exp((I_i . T_j - s_ii) / tau))      anchor: image i, over all texts
    a2_i = log(eps + 1/(n-1) sum_{j != i} exp((T_i . I_j - s_ii) / tau))      anchor: text i, over all images

Source: NeuCLIP (arXiv 2511.08417), the minimiser of the reformulated loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class DatasetFeatures(NamedTuple):
    """Features of the pairs that the exact values are means over, all with the same weights."""

    image: Tensor  # [n, d]
    text: Tensor  # [n, d]
    sample_index: Tensor  # [n] dense, ascending

    def positions(self, sample_index: Tensor) -> Tensor:
        """Where each of the pairs [b] stands, -1 for one that is not here and so has nothing to leave out."""
        places = torch.searchsorted(self.sample_index, sample_index).clamp_max(len(self.sample_index) - 1)
        return torch.where(self.sample_index[places] == sample_index, places, -1)


@torch.no_grad()
def exact_log_normalizers(
    image_features: Tensor,
    text_features: Tensor,
    positions: Tensor,
    reference_image_features: Tensor,
    reference_text_features: Tensor,
    temperature: float | Tensor,
    *,
    eps: float,
    tile_size: int = 4096,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Exact (image_rows, text_rows), each [b] of `dtype`, of b anchors against n reference pairs.

    Shapes: anchors [b, d]; reference [n, d]; `temperature` one element, or [b, 2] for a tau of each anchor and side;
    `positions` [b] int64, where each anchor's own pair stands in
    the reference and is left out, or -1 where it is not in it. The mean is over the pairs that remain: n - 1
    when the reference is the data set. Memory is [b, tile_size]. Raises ValueError for lengths or positions
    that do not fit, or an anchor that has no other pair to be compared with.
    """
    num_reference = len(reference_image_features)
    if len(reference_text_features) != num_reference:
        raise ValueError(f"reference: {num_reference} images, {len(reference_text_features)} texts; give pairs")
    if not len(image_features) == len(text_features) == len(positions):
        lengths = f"{len(image_features)} images, {len(text_features)} texts, {len(positions)} positions"
        raise ValueError(f"anchors: {lengths}; give as many of each")
    if len(positions) and not -1 <= int(positions.min()) <= int(positions.max()) < num_reference:
        raise ValueError(f"positions must be from -1 to {num_reference - 1}, the last reference pair")
    images, texts = image_features.to(dtype), text_features.to(dtype)
    tau = torch.as_tensor(temperature, dtype=dtype, device=images.device)
    taus = tau.unbind(1) if tau.ndim == 2 else (tau.reshape(()), tau.reshape(()))
    positive = (images * texts).sum(dim=-1)  # [b]
    others = num_reference - (positions >= 0).to(dtype)  # [b]
    if not bool((others > 0).all()):
        raise ValueError(f"a reference of {num_reference} pair(s) leaves an anchor nothing to be compared with")
    rows = []
    sides = (images, reference_text_features, taus[0]), (texts, reference_image_features, taus[1])
    for anchors, reference, side_tau in sides:
        mean = _log_sum_exp(anchors, positive, positions, reference, side_tau, tile_size) - others.log()
        rows.append(torch.logaddexp(mean, torch.full_like(mean, eps).log()))
    return rows[0], rows[1]


def _log_sum_exp(
    anchors: Tensor, positive: Tensor, positions: Tensor, reference: Tensor, tau: Tensor, tile_size: int
) -> Tensor:
    """log sum_{j != position} exp((anchor . reference_j - positive) / tau), [b], tile by tile; tau [] or [b]."""
    total = torch.full_like(positive, -math.inf)
    rows = torch.arange(len(anchors), device=anchors.device)
    for start in range(0, len(reference), tile_size):
        tile = reference[start : start + tile_size].to(device=anchors.device, dtype=anchors.dtype)
        scores = (anchors @ tile.T - positive[:, None]) / tau.reshape(-1, 1)  # [b, t]
        inside = (positions >= start) & (positions < start + len(tile))
        scores[rows[inside], positions[inside] - start] = -math.inf
        total = torch.logaddexp(total, scores.logsumexp(dim=1))
    return total


def error_statistics(estimate: Tensor, exact: Tensor) -> dict[str, float]:
    """How far estimated log-normalizers are from the exact ones, of one shape ([b], or [b, 2] for both
    sides).

    mse: mean squared error; bias: mean of estimate - exact; worst_decile: mean absolute error of the worst
    tenth of the values (at least one).
    """
    if estimate.shape != exact.shape or estimate.numel() == 0:
        raise ValueError(f"estimate {tuple(estimate.shape)} and exact {tuple(exact.shape)} must be equal and not empty")
    error = estimate.double() - exact.double().to(estimate.device)
    worst = error.abs().flatten().topk(max(1, math.ceil(error.numel() / 10))).values
    return {
        "mse": float(error.square().mean()),
        "bias": float(error.mean()),
        "worst_decile": float(worst.mean()),
    }
