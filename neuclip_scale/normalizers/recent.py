"""The most recent pairs' embeddings, from which the NPN is restarted."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecentPairs(nn.Module):
    """A ring of the last `capacity` pairs: image and text embeddings and their sample indices.

    Every rank pushes the same world batch, so the rings are equal without communication.
    """

    image: Tensor
    text: Tensor
    index: Tensor
    pushed: Tensor

    def __init__(self, embed_dim: int, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.register_buffer("image", torch.zeros(capacity, embed_dim))
        self.register_buffer("text", torch.zeros(capacity, embed_dim))
        self.register_buffer("index", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, index: Tensor) -> None:
        """Overwrite the oldest entries with a world batch, [B, d], [B, d], [B]."""
        newest = slice(-min(self.capacity, image.shape[0]), None)
        count = index[newest].shape[0]
        slots = (self.pushed + torch.arange(count, device=self.index.device)) % self.capacity
        self.image[slots], self.text[slots] = image[newest].to(self.image), text[newest].to(self.text)
        self.index[slots] = index[newest]
        self.pushed += count

    def __len__(self) -> int:
        return min(int(self.pushed), self.capacity)
