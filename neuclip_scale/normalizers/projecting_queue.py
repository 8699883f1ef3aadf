"""A queue that keeps what the towers' last maps were given, and maps it anew, by turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.normalizers.queue import EmbeddingQueue
from neuclip_scale.normalizers.rounded import Rounded
from neuclip_scale.projection import Projection
from neuclip_scale.similarity import BatchShape, PairFeatures
from neuclip_scale.transfers import to_device

Rows = Sequence[slice | Tensor]


class ProjectingQueue(EmbeddingQueue):
    """`EmbeddingQueue` whose entries are what the last maps, nearly as they stand, make of their former inputs.

    So the last map's part of the drift, which is known and the same for all pairs, makes no entry old. Every entry goes
    through the maps in every step where M is less than 128 B, else each once in M/64 B steps. An entry mapped takes 2
    width d FLOPs, and each has `width` numbers a side beside its embedding.
    """

    STEPS_PER_TURN = 64
    """Steps of pairs that go through the last maps in one step."""
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
        """Map those of this rank's slots whose turn it is as the batch's pairs were mapped. No communication."""
        image, text = _shown(pairs)
        rows = self._due(pairs.global_size)
        self._map(self.image, self.image_inputs, rows, image, self._rounded_image)
        self._map(self.text, self.text_inputs, rows, text, self._rounded_text)

    def _due(self, global_size: int) -> Rows:
        """Places in this rank's buffers, in parts of at most `ROWS`."""
        filled, turn = self.num_filled, self.steps_between(global_size)
        if turn == 1:
            used = len(range(self.rank, filled, self.world_size))
            return [slice(first, min(first + self.ROWS, used)) for first in range(0, used, self.ROWS)]
        # The batches pushed `turn`, 2 `turn`, ... steps ago: which they are does not depend on the number of ranks.
        first_pairs = np.arange(turn - 1, math.ceil(filled / global_size), turn)[:, None] * global_size
        younger = (first_pairs + np.arange(global_size)).ravel()
        slots = (self.num_pushed - 1 - younger[younger < filled]) % self.size
        mine = slots[slots % self.world_size == self.rank] // self.world_size  # on the host, as in `push`
        return list(to_device(torch.from_numpy(mine), self.index.device).split(self.ROWS))

    def steps_between(self, global_size: int) -> int:
        """Steps from one time that an entry is mapped to the next."""
        return max(1, self.size // (self.STEPS_PER_TURN * global_size))

    def num_mapped(self, global_size: int) -> int:
        """Entries of this rank that are mapped in a step with a full queue, to within a few of each batch."""
        return math.ceil(len(self.index) / self.steps_between(global_size))

    def write(self, pairs: PairFeatures, newest: Tensor, places: Tensor) -> None:
        """Both embeddings, and the inputs (collective): each tower's gathered, [B, width], in the tower's dtype."""
        super().write(pairs, newest, places)
        for kept, projection in zip((self.image_inputs, self.text_inputs), _shown(pairs), strict=True):
            kept[places] = distributed.all_gather_rows(projection.inputs)[newest].to(kept)

    def flops(self, shape: BatchShape, num_horizons: int) -> int:
        """See `EmbeddingQueue.flops`; and a product of [entries mapped, width] for each tower."""
        width = self.image_inputs.shape[1] + self.text_inputs.shape[1]
        return super().flops(shape, num_horizons) + 2 * self.num_mapped(shape.global_size) * width * shape.embed_dim

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's slots: inputs, and what was made of each when it was mapped last."""
        return {
            "queue_image_inputs": self.image_inputs,
            "queue_text_inputs": self.text_inputs,
            "queue_image_mapped": self.image,
            "queue_text_mapped": self.text,
            "queue_index": self.index,
        }

    @staticmethod
    def _map(embeddings: Tensor, inputs: Tensor, parts: Rows, projection: Projection, rounded: Rounded) -> None:
        matrix = projection.matrix.to(inputs)
        for rows in parts:
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
