"""The embeddings one rank needs for a contrastive step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuclip_scale.projection import Projection

_HALVES = (torch.bfloat16, torch.float16)
_ROWS_ON_A_CPU = 1024
_ROWS_ON_A_GPU = 8192


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
    """L2-normalised embeddings of this rank's pairs and of all ranks' pairs, none of them with a graph.

    All of one dtype: fp32 or fp64, or bf16 or fp16, for which sums over d are fp32 all the same.
    """

    image: Tensor  # [b, d]
    text: Tensor  # [b, d]
    world_image: Tensor  # [B, d], rank after rank
    world_text: Tensor  # [B, d]
    offset: int = 0
    """Row of the world that holds this rank's first pair."""
    projections: tuple[Projection, Projection] | None = None
    """What made `image` and `text`, for normalizers that apply it to past pairs too."""

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

    @property
    def has_positives(self) -> bool:
        """Whether this rank's pairs find their partners in the world."""
        return True

    def positives(self) -> Tensor:
        """s_ii of this rank's pairs -> [b], at least fp32."""
        return row_products(self.image, self.text)

    def world_positives(self) -> Tensor:
        """s_ii of all ranks' pairs -> [B], at least fp32."""
        return row_products(self.world_image, self.world_text)

    def world_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of some rows of the world, [k] -> image, text [k, d]."""
        return self.world_image[rows], self.world_text[rows]

    def to(self, dtype: torch.dtype) -> PairFeatures:
        """The same in another dtype; itself where it has it."""
        if self.image.dtype == dtype:
            return self
        image, text = self.world_image.to(dtype), self.world_text.to(dtype)
        own = image, text
        if not (self.image is self.world_image and self.text is self.world_text):
            own = self.image.to(dtype), self.text.to(dtype)
        return replace(self, image=own[0], text=own[1], world_image=image, world_text=text)

    def full_precision(self) -> PairFeatures:
        """In fp32, unless they are in fp32 or fp64: what networks and torch's products take."""
        return self.to(torch.float32) if self.image.dtype in _HALVES else self

    def local_rows(self, world_rows: Tensor) -> Tensor:
        """This rank's part of a [B, ...] tensor -> [b, ...]."""
        return world_rows[self.offset : self.offset + self.local_size]


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each row of `left` with the same row of `right`, [n, d] each -> [n], at least fp32.

    Some rows at a time: the products of all would be as large as the features themselves.
    """
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    rows = _ROWS_ON_A_CPU if left.device.type == "cpu" else _ROWS_ON_A_GPU
    parts = zip(left.split(rows), right.split(rows), strict=True)
    return torch.cat([(a.to(wide) * b.to(wide)).sum(-1) for a, b in parts])
