"""Nearest rows by inner product, tile by tile: the clusters of embeddings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class NearestRows:
    """Rows that stay on a device, and which of them is nearest to each of some features."""

    def __init__(self, rows: np.ndarray, device: str = "auto", process: int = 0, num_threads: int = 0) -> None:
        """Put [k, d] `rows` on a device as fp32; `auto` takes CUDA where there is one.

        Processes take the GPUs in turn, by their number. `num_threads` limits what this one takes of a CPU, unless 0.
        Raises ValueError for `cuda` where there is none.
        """
        if num_threads:
            torch.set_num_threads(num_threads)
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device; give cpu, or auto")
        is_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        number = process % max(1, torch.cuda.device_count())
        self._device = torch.device("cuda", number) if is_cuda else torch.device("cpu")
        self._rows = self._tensor(rows)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[n] int64, see `nearest_rows`; `features` [n, d]."""
        return np.asarray(nearest_rows(self._tensor(features), self._rows).cpu().numpy())

    def _tensor(self, rows: np.ndarray) -> Tensor:
        # A copy: what is memory-mapped cannot be written, which torch warns of.
        return torch.from_numpy(np.array(rows, dtype=np.float32)).to(self._device)


@torch.no_grad()
def nearest_rows(features: Tensor, rows: Tensor, tile_size: int = 8192) -> Tensor:
    """For each feature the row with the largest inner product, the first of equal ones; -1 where none is finite.

    `features` [n, d] and `rows` [k, d] in fp32 on one device; returns [n] int64. No [n, k] matrix is made.
    """
    best = torch.full((len(features),), -torch.inf, device=features.device)
    nearest = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
    if not len(features):
        return nearest
    for begin in range(0, len(rows), tile_size):
        # [n, tile] -> [n]; max takes the first of equal ones, and so does > from tile to tile.
        products = features @ rows[begin : begin + tile_size].T
        # A row of NaN is nearest to nothing, and takes no feature from the tile's other rows.
        value, index = products.nan_to_num_(-torch.inf, -torch.inf, -torch.inf).max(dim=1)
        is_better = value > best
        best = torch.where(is_better, value, best)
        nearest = torch.where(is_better, index + begin, nearest)
    return nearest
