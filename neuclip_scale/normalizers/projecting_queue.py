"""A queue of what the towers' last maps were given, so that these maps, as they stand, take part in every sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.normalizers.queue import EmbeddingQueue
from neuclip_scale.projection import Projection
from neuclip_scale.similarity import BatchShape, PairFeatures


class ProjectingQueue(EmbeddingQueue):
    """`EmbeddingQueue` in whose sums an entry is x W / |x W_then|: what the last map W makes of its former input x now.

    So the last map's part of the drift, which is known and the same for all pairs, makes no entry old. No entry is
    mapped again: a . (x W) = (W a) . x, and the few anchors a go through the transposed map instead. An entry is
    x / |x W_then|, `width` numbers for each side in place of d, and the length stays that of when it came: where the
    layers below have moved on, x W is shorter or longer than what they would give now, and estimates that keep this
    are nearer to the truth than those with entries brought back to length 1 (docs/normalizers.md).
    """

    def __init__(
        self, widths: tuple[int, int], size: int, *, rank: int | None = None, world_size: int | None = None
    ) -> None:
        """`widths` of what the image and the text tower's last map are given."""
        super().__init__(widths, size, rank=rank, world_size=world_size)

    def anchors(self, pairs: PairFeatures) -> tuple[Tensor, Tensor]:
        """Image anchors through the text tower's map, for they meet captions: [B, text width]; and the others."""
        image, text = _shown(pairs)
        return _transposed(pairs.world_image, text), _transposed(pairs.world_text, image)

    def entries(self, pairs: PairFeatures, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `EmbeddingQueue.entries` (collective): each tower's inputs are gathered, [B, width], in its dtype."""
        image, text = (_preimages(projection, rows) for projection in _shown(pairs))
        return image, text

    def flops(self, shape: BatchShape, num_horizons: int) -> int:
        """See `EmbeddingQueue.flops`; and the anchors through the maps."""
        return super().flops(shape, num_horizons) + 2 * shape.global_size * sum(self.widths) * shape.embed_dim

    def rank_state(self) -> dict[str, Any]:
        """This rank's slots."""
        return {
            "queue_image_preimages": self.image,
            "queue_text_preimages": self.text,
            "queue_index": self.index,
        }


def _transposed(anchors: Tensor, projection: Projection) -> Tensor:
    anchors = _wide(anchors)
    return anchors @ projection.matrix.to(anchors).T


def _preimages(projection: Projection, rows: Tensor) -> Tensor:
    """What the map takes to embeddings of unit length, of some rows of the world -> [k, width], at least fp32."""
    inputs = _wide(distributed.all_gather_rows(projection.inputs)[rows])
    lengths = torch.linalg.vector_norm(inputs @ projection.matrix.to(inputs), dim=1, keepdim=True)
    return inputs / lengths.clamp_min_(torch.finfo(lengths.dtype).tiny)


def _wide(rows: Tensor) -> Tensor:
    """In fp32, unless they are in fp64."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _shown(pairs: PairFeatures) -> tuple[Projection, Projection]:
    if pairs.projections is None:
        raise ValueError(
            "pairs.projections = None: objective.queue.project_anew asks for what the towers' last maps are given. "
            "Call CLIP.show_projections() before the forward pass, or set it to false."
        )
    return pairs.projections
