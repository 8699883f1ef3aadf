"""How far back to look: the mixture of horizons that explains fresh batches best, learned as training goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 0.5
"""Of the weights' logarithms, for a gradient without unit: 0.3 to 2 give the same error (docs/normalizers.md)."""
LEAST_WEIGHT = 1e-3
"""What a horizon keeps, to come back when embeddings move faster or slower."""
LARGEST_RATIO = 20.0
"""Of a batch's g to the mixture's: one anchor that nothing resembled before shall not decide."""


class HorizonMixture(nn.Module):
    """Weights c of H horizons for each side, none negative and 1 together: a_i = log sum_h c_h exp(a^h_i).

    Each side has its own, for its negatives come from one tower, and the towers do not move alike.

    The weights follow the loss of the reformulation on every new batch, l = mean_i exp(-a_i)(eps + g_i) + a_i - 1 with
    g the batch's, and a from past pairs alone: a batch's negatives are no part of what they judge. It is least for
    a = log(eps + E g), so short horizons gain while embeddings move fast and long ones when they do not, whatever data
    and batch size are. One exponentiated gradient step a batch (Kivinen and Warmuth 1997,
    doi:10.1006/inco.1996.2612):

        dl/dc_h = mean_i exp(a^h_i - a_i) (1 - exp(-a_i)(eps + g_i)),      c_h <- c_h exp(-0.5 dl/dc_h) / sum
    """

    horizons: Tensor
    weights: Tensor

    def __init__(self, horizons: Tensor) -> None:
        """`horizons` [H] in pairs, ascending. The shortest begins with most weight: embeddings move fastest then."""
        super().__init__()
        self.register_buffer("horizons", horizons, persistent=False)
        halves = 0.5 ** torch.arange(1, len(horizons) + 1, dtype=torch.float64)  # 1/2, 1/4, ..., and what is left
        halves[-1] *= 2
        self.register_buffer("weights", halves.repeat(2, 1))
        self.register_load_state_dict_pre_hook(_without_older_losses)

    def mix(self, rows: Tensor) -> Tensor:
        """The mixture's log-normalizers for those of each horizon: [b, 2, H] -> [b, 2]."""
        return torch.logsumexp(rows + self.weights.log().to(rows), -1)

    def gradients(self, past: Tensor, batch_rows: Tensor) -> Tensor:
        """dl/dc of every anchor, [b, 2, H]; `past` [b, 2, H] from past pairs, `batch_rows` [b, 2]."""
        mixed = self.mix(past)
        ratio = (batch_rows - mixed).exp().clamp_max(LARGEST_RATIO)
        return (past - mixed[..., None]).exp() * (1 - ratio)[..., None]

    @torch.no_grad()
    def learn(self, gradients: Tensor, count: Tensor) -> None:
        """Take in a batch: sums of `gradients` [2, H] over the anchors of all ranks and how many there were, [].

        Nothing is read back from the device. No anchor, as in the first step, changes nothing.
        """
        mean = (gradients / count.clamp_min(1)).to(self.weights)
        weights = torch.softmax(self.weights.log() - LEARNING_RATE * mean, -1).clamp_min(LEAST_WEIGHT)
        self.weights.copy_(weights / weights.sum(-1, keepdim=True))

    def mean_horizon(self, size: int) -> Tensor:
        """The horizons' geometric mean by both sides' weights, in pairs, []; infinity counts as the queue's size."""
        return (self.weights.mean(0) * self.horizons.clamp_max(size).log()).sum().exp().to(self.horizons)


def horizons_up_to(size: int, global_batch_size: int) -> Tensor:
    """B, 2 B, 4 B, ... below M, and infinity, [H]: every scale on which a queue of M pairs can forget."""
    horizons, pairs = [], float(global_batch_size)
    while pairs < size:
        horizons.append(pairs)
        pairs *= 2
    return torch.tensor([*horizons, torch.inf])


def _without_older_losses(mixture: HorizonMixture, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of older code hold a running loss of each horizon: there the weights begin anew."""
    if state.pop(f"{prefix}losses", None) is not None:
        del state[f"{prefix}started"]
        state[f"{prefix}weights"] = mixture.weights
