"""A batch of image-text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """b pairs; rows belong together over all fields."""

    images: Tensor  # [b, 3, H, W] float32, normalised
    tokens: Tensor  # [b, L] int64
    sample_index: Tensor  # [b] int64, dense: 0 .. dataset size - 1
    uids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.uids)

    def split(self, micro_batch_size: int) -> list[Batch]:
        """Consecutive parts of `micro_batch_size` pairs, as views; the last may be smaller."""
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size = {micro_batch_size}: must be at least 1.")
        return [
            Batch(
                self.images[start : start + micro_batch_size],
                self.tokens[start : start + micro_batch_size],
                self.sample_index[start : start + micro_batch_size],
                self.uids[start : start + micro_batch_size],
            )
            for start in range(0, len(self), micro_batch_size)
        ]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on `device`; `non_blocking` needs pinned memory to have an effect."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.tokens.to(device, non_blocking=non_blocking),
            self.sample_index.to(device, non_blocking=non_blocking),
            self.uids,
        )

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; needs a GPU."""
        images, tokens = self.images.pin_memory(), self.tokens.pin_memory()
        return Batch(images, tokens, self.sample_index.pin_memory(), self.uids)


def join_batches(parts: Sequence[Batch], *, pin_memory: bool = False) -> Batch:
    """Rows of all parts in order; with `pin_memory` the one copy this takes goes to page-locked memory."""
    if len(parts) == 1 and not pin_memory:
        return parts[0]
    return Batch(
        _join([part.images for part in parts], pin_memory),
        _join([part.tokens for part in parts], pin_memory),
        _join([part.sample_index for part in parts], pin_memory),
        tuple(uid for part in parts for uid in part.uids),
    )


def _join(parts: list[Tensor], pin_memory: bool) -> Tensor:
    rows = sum(len(part) for part in parts)
    out = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, pin_memory=pin_memory)
    return torch.cat(parts, out=out)
