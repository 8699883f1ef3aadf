"""A tower's last map, shown beside its features to whoever wants to apply it again to what it was given before."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGE = 1024.0


class Projection(NamedTuple):
    """features = inputs @ matrix, before they are brought to unit length; neither has a graph."""

    inputs: Tensor  # [N, width], a tower's pooled pictures or captions
    matrix: Tensor  # [width, embed_dim], a copy: a sharded parameter's own memory is gone after the pass

    @classmethod
    def of(cls, inputs: Tensor, matrix: Tensor) -> Projection:
        """From a pass's own tensors."""
        return cls(inputs.detach(), matrix.detach().clone())

    @classmethod
    @torch.no_grad()
    def of_linear(cls, inputs: Tensor, layer: nn.Linear) -> Projection:
        """That of a linear layer by what it does: ZeRO 3 gathers its weights for a call, not for a reader.

        A bias is one row more of the matrix, for a one behind the inputs.
        """
        unit = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        if layer.bias is None:
            return cls.of(inputs, layer(unit))
        offset = layer(torch.zeros_like(inputs[:1]))  # [1, embed_dim]
        # So large beside the offset that the layer's rounding, to bf16 say, leaves the weights' own digits.
        matrix = (layer(_LARGE * unit) - offset) / _LARGE
        return cls.of(F.pad(inputs, (0, 1), value=1.0), torch.cat([matrix, offset]))


class TowerOutput(NamedTuple):
    """What a tower makes of a micro-batch."""

    features: Tensor
    """[N, embed_dim], not yet of unit length."""
    projection: Projection | None = None
    """Where the tower's `shows_projection` is set."""
