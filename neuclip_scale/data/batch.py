"""A batch of image-text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuclip_scale.data.normalization import Normalization

if TYPE_CHECKING:
    from neuclip_scale.models.clip import CLIP
    from neuclip_scale.models.packing import Packing


@dataclass(frozen=True)
class Batch:
    """b pairs; rows belong together over all fields."""

    images: Tensor  # [b, 3, H, W] float32, normalised; uint8 pixels while `normalization` waits for `to`
    tokens: Tensor  # [b, L] int64
    sample_index: Tensor  # [b] int64, dense: 0 .. dataset size - 1
    uids: tuple[str, ...]
    normalization: Normalization | None = None
    """What `to` has yet to do to `images`: between processes and to the GPU they travel as bytes, a quarter as many."""
    text_lengths: tuple[int, ...] = ()
    """`caption_lengths` of the tokens, known to the host; () unknown."""
    packing: Packing | None = None
    """How the text tower packs these captions; None where it does not."""

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
                self.normalization,
                self.text_lengths[start : start + micro_batch_size],
            )
            for start in range(0, len(self), micro_batch_size)
        ]

    def packed(self, model: CLIP) -> Batch:
        """With the packing of its captions for this model, on the tokens' device. To be done after `split` and `to`."""
        return replace(self, packing=model.pack(self.text_lengths, self.tokens.device))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on `device`, normalised there; `non_blocking` needs pinned memory to have an effect."""
        moved = self.images.to(device, non_blocking=non_blocking)
        return Batch(
            self.normalization(moved) if self.normalization else moved,
            self.tokens.to(device, non_blocking=non_blocking),
            self.sample_index.to(device, non_blocking=non_blocking),
            self.uids,
            text_lengths=self.text_lengths,
        )

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; needs a GPU."""
        images, tokens = self.images.pin_memory(), self.tokens.pin_memory()
        return replace(self, images=images, tokens=tokens, sample_index=self.sample_index.pin_memory())


def caption_lengths(tokens: Tensor) -> tuple[int, ...]:
    """Tokens of each caption, of `tokens` [N, L] on the host, up to its end, the largest id of CLIP's vocabulary."""
    return tuple((tokens.argmax(dim=-1) + 1).tolist())


def join_batches(parts: Sequence[Batch], *, pin_memory: bool = False) -> Batch:
    """Rows of all parts in order, normalised.

    With `pin_memory` the one copy this takes goes to page-locked memory, and `to` normalises on the device.
    """
    joined = parts[0] if len(parts) == 1 and not pin_memory else _joined(parts, pin_memory)
    return joined if pin_memory else joined.to(joined.images.device)


def _joined(parts: Sequence[Batch], pin_memory: bool) -> Batch:
    return Batch(
        _join([part.images for part in parts], pin_memory),
        _join([part.tokens for part in parts], pin_memory),
        _join([part.sample_index for part in parts], pin_memory),
        tuple(uid for part in parts for uid in part.uids),
        parts[0].normalization,
        tuple(length for part in parts for length in part.text_lengths),
    )


def _join(parts: list[Tensor], pin_memory: bool) -> Tensor:
    rows = sum(len(part) for part in parts)
    out = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, pin_memory=pin_memory)
    return torch.cat(parts, out=out)
