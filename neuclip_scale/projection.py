"""A tower's last map, shown beside its features to whoever wants to apply it again to what it was given before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_LARGE = 1024.0


class Projection(NamedTuple):
    """features = inputs @ matrix + offset, before they are brought to unit length; no part of it has a graph."""

    inputs: Tensor  # [N, width], a tower's pooled pictures or captions
    matrix: Tensor  # [width, embed_dim], a copy: a sharded parameter's own memory is gone after the pass
    offset: Tensor | None = None  # [embed_dim]

    @classmethod
    def of(cls, inputs: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Projection:
        """From a pass's own tensors."""
        return cls(inputs.detach(), matrix.detach().clone(), None if offset is None else offset.detach().clone())

    @classmethod
    @torch.no_grad()
    def of_linear(cls, inputs: Tensor, layer: nn.Module) -> Projection:
        """That of a linear layer by what it does: ZeRO 3 gathers its weights for a call, not for a reader."""
        offset = layer(torch.zeros_like(inputs[:1]))  # [1, embed_dim]
        unit = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        # So large beside the offset that the layer's rounding, to bf16 say, leaves the weights' own digits.
        return cls.of(inputs, (layer(_LARGE * unit) - offset) / _LARGE, offset[0])


class TowerOutput(NamedTuple):
    """What a tower makes of a micro-batch."""

    features: Tensor
    """[N, embed_dim], not yet of unit length."""
    projection: Projection | None = None
    """Where the tower's `shows_projection` is set."""
