"""Which entries of a queue are an anchor's own: by sorting and bisection, so that the host waits for no number."""

from __future__ import annotations

import torch
from torch import Tensor


class OwnEntries:
    """The entries of an anchor's sample index stand next to each other in sorted order: no [B, K] mask."""

    def __init__(self, entry_index: Tensor, world_index: Tensor) -> None:
        """Sample indices of the entries [K] and of the anchors [B], int64."""
        self._entry_index = entry_index
        self._sorted, self._order = entry_index.sort()
        self._first, self._last = (
            torch.searchsorted(self._sorted, world_index, right=right) for right in (False, True)
        )  # [B]

    def sums_of_others(self, weights: Tensor) -> Tensor:
        """sum_q w_q over all entries but each anchor's own, for `weights` [K, H] -> [B, H]."""
        count, num_horizons = weights.shape
        # Along rows: a GPU adds up few long columns one number after the other. Differences of sums need the digits.
        below = torch.zeros(num_horizons, count + 1, dtype=torch.float64, device=weights.device)
        torch.cumsum(weights[self._order].T, 1, dtype=torch.float64, out=below[:, 1:])
        # What is left of nothing may round below it.
        others = below[:, -1:] - (below[:, self._last] - below[:, self._first])
        return others.T.clamp_min_(0).to(weights.dtype)

    def codes(self) -> tuple[Tensor, Tensor]:
        """32-bit indices that agree where the sample indices do: of anchors [B], -1 if none does; of entries [K]."""
        anchors = torch.where(self._last > self._first, self._first, -1).to(torch.int32)
        return anchors, torch.searchsorted(self._sorted, self._entry_index, out_int32=True)
