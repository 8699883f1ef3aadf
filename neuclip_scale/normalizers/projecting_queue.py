"""A queue that keeps what the towers' last maps were given, and maps it anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.normalizers.queue import EmbeddingQueue
from neuclip_scale.normalizers.rounded import Rounded
from neuclip_scale.projection import Projection
from neuclip_scale.similarity import BatchShape, PairFeatures


class ProjectingQueue(EmbeddingQueue):
    """`EmbeddingQueue` whose entries are what the last maps, as they stand, make of their former inputs.

    So the last map's part of the drift, which is known and the same for all pairs, makes no entry old. It takes 2 M
    width d FLOPs a step for each tower, and `width` numbers an entry and side beside its embedding.
    """

    ROWS = 8192
    """Entries mapped at a time, which bounds what the work adds to the queue's own memory."""
    image_inputs: Tensor
    text_inputs: Tensor

    def __init__(
        self,
        embed_dim: int,
        size: int,
        widths: tuple[int, int],
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(embed_dim, size, rank=rank, world_size=world_size)
        owned = len(self.index)
        self.register_buffer("image_inputs", torch.zeros(owned, widths[0]), persistent=False)
        self.register_buffer("text_inputs", torch.zeros(owned, widths[1]), persistent=False)

    @torch.no_grad()
    def refresh(self, pairs: PairFeatures) -> None:
        """Map this rank's slots in use as the batch's pairs were mapped. No communication."""
        image, text = _shown(pairs)
        used = len(range(self.rank, self.num_filled, self.world_size))
        self._map(self.image, self.image_inputs[:used], image, self._rounded_image)
        self._map(self.text, self.text_inputs[:used], text, self._rounded_text)

    def write(self, pairs: PairFeatures, newest: Tensor, places: Tensor) -> None:
        """The inputs (collective): each tower's gathered, [B, width], in the tower's dtype. `refresh` maps them."""
        for kept, projection in zip((self.image_inputs, self.text_inputs), _shown(pairs), strict=True):
            kept[places] = distributed.all_gather_rows(projection.inputs)[newest].to(kept)

    def flops(self, shape: BatchShape, num_horizons: int) -> int:
        """See `EmbeddingQueue.flops`; and a product of [M/W, width] for each tower."""
        width = self.image_inputs.shape[1] + self.text_inputs.shape[1]
        return super().flops(shape, num_horizons) + 2 * len(self.index) * width * shape.embed_dim

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's slots; the embeddings follow from the inputs."""
        return {
            "queue_image_inputs": self.image_inputs,
            "queue_text_inputs": self.text_inputs,
            "queue_index": self.index,
        }

    @staticmethod
    def _map(embeddings: Tensor, inputs: Tensor, projection: Projection, rounded: Rounded) -> None:
        matrix = projection.matrix.to(inputs)
        for first in range(0, len(inputs), ProjectingQueue.ROWS):
            rows = slice(first, min(first + ProjectingQueue.ROWS, len(inputs)))
            features = inputs[rows] @ matrix
            if projection.offset is not None:
                features += projection.offset.to(features)
            rounded.write(embeddings, rows, F.normalize(features, dim=-1))


def _shown(pairs: PairFeatures) -> tuple[Projection, Projection]:
    if pairs.projections is None:
        raise ValueError(
            "pairs.projections = None: objective.queue.project_anew asks for what the towers' last maps are given. "
            "Call CLIP.show_projections() before the forward pass, or set it to false."
        )
    return pairs.projections
