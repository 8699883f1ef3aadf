"""The dense formulas, slow and obvious: what the tiled path is tested against. Works in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from neuclip_scale.similarity.pairs import PairFeatures


def pair_logsumexp(pairs: PairFeatures, scale: Tensor, *, exclude_diagonal: bool) -> tuple[Tensor, Tensor]:
    """See `tiled.pair_logsumexp`."""
    image_logits, text_logits = _logits(pairs, scale, exclude_diagonal)
    return torch.logsumexp(image_logits, 1), torch.logsumexp(text_logits, 1)


def pair_gradients(
    pairs: PairFeatures, scale: Tensor, image_shift: Tensor, text_shift: Tensor, *, exclude_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """See `tiled.pair_gradients`."""
    image_logits, text_logits = _logits(pairs, scale, exclude_diagonal)
    image_weights = (image_logits - pairs.local_rows(image_shift)[:, None]).exp() + (image_logits - text_shift).exp()
    text_weights = (text_logits - pairs.local_rows(text_shift)[:, None]).exp() + (text_logits - image_shift).exp()
    return image_weights @ pairs.world_text, text_weights @ pairs.world_image


def _logits(pairs: PairFeatures, scale: Tensor, exclude_diagonal: bool) -> tuple[Tensor, Tensor]:
    image_logits = scale * pairs.image @ pairs.world_text.T  # [b, B]
    text_logits = scale * pairs.text @ pairs.world_image.T  # [b, B]
    if exclude_diagonal:
        rows = torch.arange(pairs.local_size)
        image_logits[rows, rows + pairs.offset] = -torch.inf
        text_logits[rows, rows + pairs.offset] = -torch.inf
    return image_logits, text_logits
