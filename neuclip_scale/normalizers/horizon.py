"""How far back to look: the horizon whose normalizers explain fresh batches best, chosen as training goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 0.95
"""Decay of the losses' running mean: about 20 steps."""


class HorizonChoice(nn.Module):
    """Follows the loss of each of H horizons on every new batch and names the best.

    The loss is that of the reformulation itself, mean_i exp(-a_i)(eps + g_i) + a_i - 1 with g the new batch's, and a
    from past pairs alone: a batch's negatives are no part of what they judge. It is least for a = log(eps + E g), so a
    short horizon wins while embeddings move fast and a long one when they do not, whatever data and batch size are.
    """

    horizons: Tensor
    losses: Tensor
    started: Tensor

    def __init__(self, horizons: Tensor) -> None:
        """`horizons` [H] in pairs."""
        super().__init__()
        self.register_buffer("horizons", horizons, persistent=False)
        self.register_buffer("losses", torch.zeros(len(horizons)))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @property
    def best(self) -> Tensor:
        """Place of the best horizon, []; the shortest until there are losses."""
        return self.losses.argmin()

    @torch.no_grad()
    def judge(self, losses: Tensor, count: Tensor) -> None:
        """Take in a batch's losses: their sums [H] over the anchors of all ranks and how many there were, [].

        Nothing is read back from the device. No anchor, as in the first step, changes nothing.
        """
        fresh = (losses / count.clamp_min(1)).to(self.losses)
        moved = torch.where(self.started, torch.lerp(fresh, self.losses, MEMORY), fresh)
        self.losses.copy_(torch.where(count > 0, moved, self.losses))
        self.started.logical_or_(count > 0)


def horizons_up_to(size: int, global_batch_size: int) -> Tensor:
    """B, 2 B, 4 B, ... below M, and infinity, [H]: every scale on which a queue of M pairs can forget."""
    horizons, pairs = [], float(global_batch_size)
    while pairs < size:
        horizons.append(pairs)
        pairs *= 2
    return torch.tensor([*horizons, torch.inf])
