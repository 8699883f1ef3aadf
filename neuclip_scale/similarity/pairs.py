"""The embeddings one rank needs for a contrastive step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a contrastive step on one rank, from which its arithmetic follows."""

    local_size: int
    """b, pairs on this rank."""
    global_size: int
    """B, pairs over all ranks."""
    embed_dim: int
    """d."""

    @property
    def is_whole(self) -> bool:
        """Whether one rank holds all pairs."""
        return self.local_size == self.global_size

    @property
    def world_size(self) -> int:
        """W."""
        return self.global_size // self.local_size

    def products(self, count: int) -> int:
        """FLOPs of `count` products of this rank's rows with the world's, 2 b B d each."""
        return 2 * count * self.local_size * self.global_size * self.embed_dim


@dataclass(frozen=True)
class PairFeatures:
    """L2-normalised embeddings of this rank's pairs and of all ranks' pairs, none of them with a graph."""

    image: Tensor  # [b, d]
    text: Tensor  # [b, d]
    world_image: Tensor  # [B, d], rank after rank
    world_text: Tensor  # [B, d]
    offset: int = 0
    """Row of the world that holds this rank's first pair."""

    @classmethod
    def single(cls, image: Tensor, text: Tensor) -> PairFeatures:
        """All pairs are on this process."""
        return cls(image, text, image, text)

    @property
    def local_size(self) -> int:
        """b."""
        return self.image.shape[0]

    @property
    def global_size(self) -> int:
        """B."""
        return self.world_image.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all pairs, so that one sweep serves both directions."""
        return self.local_size == self.global_size

    def positives(self) -> Tensor:
        """s_ii of this rank's pairs -> [b]."""
        return row_dots(self.image, self.text)

    def local_rows(self, world_rows: Tensor) -> Tensor:
        """This rank's part of a [B, ...] tensor -> [b, ...]."""
        return world_rows[self.offset : self.offset + self.local_size]


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each row of `left` with the same row of `right`, both [n, d] -> [n].

    Some rows at a time: the products of all would be as large as the features themselves.
    """
    parts = zip(left.split(_ROWS_AT_ONCE), right.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(rows * others).sum(-1) for rows, others in parts])
