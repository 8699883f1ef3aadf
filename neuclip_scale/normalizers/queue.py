"""A queue of past embeddings as negatives of the normalizers, joined with the batch's own, sharded over the ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.similarity import BatchShape, PairFeatures


class EmbeddingQueue(nn.Module):
    """The last M pairs of all ranks: both embeddings and the sample index; rank r keeps the slots congruent to r.

    Estimate of both sides' log-normalizers, M_i the entries that are not anchor i's own pair of an earlier epoch:

        a_i = log( (sum_q exp((x_i . q - s_ii)/tau) + sum_{j != i in batch} exp((s_ij - s_ii)/tau)) / (M_i + B - 1) )

    The p-th pair ever pushed stands in slot p mod M, so the union over ranks does not depend on their number. Each rank
    sums over its slots for all ranks' anchors: work and memory per rank are those of a queue of M/W entries.
    """

    image: Tensor
    text: Tensor
    index: Tensor
    pushed: Tensor

    def __init__(self, embed_dim: int, size: int, *, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        owned = len(range(self.rank, size, self.world_size))
        self.register_buffer("image", torch.zeros(owned, embed_dim), persistent=False)
        self.register_buffer("text", torch.zeros(owned, embed_dim), persistent=False)
        # -1: an empty slot
        self.register_buffer("index", torch.full((owned,), -1, dtype=torch.int64), persistent=False)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def log_sums(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor, *, tile_size: int
    ) -> tuple[Tensor, Tensor]:
        """log of the sum over the queue for this rank's (image, text) anchors [b, 2], and M_i [b] (collective).

        `scale` is 1/tau, one element. Both sides leave out the same entries. One all-gather of [B, 3].
        """
        positives = (pairs.world_image * pairs.world_text).sum(-1)
        image, count = self._sweep(pairs.world_image, self.text, positives, scale, world_index, tile_size)
        text, _ = self._sweep(pairs.world_text, self.image, positives, scale, world_index, tile_size)
        partial = distributed.all_gather_rows(torch.stack([image, text, count], 1))
        partial = pairs.local_rows(partial.view(self.world_size, -1, 3).transpose(0, 1))  # [b, W, 3]
        return torch.logsumexp(partial[..., :2], 1), partial[..., 2].sum(1)

    def _sweep(
        self,
        anchors: Tensor,
        negatives: Tensor,
        positives: Tensor,
        scale: Tensor,
        world_index: Tensor,
        tile_size: int,
    ) -> tuple[Tensor, Tensor]:
        """log sum_q exp(scale (x_i . q - s_ii)) over this rank's slots and how many of them counted, both [B]."""
        total, count = torch.full_like(positives, -torch.inf), torch.zeros_like(positives)
        # Until the queue has filled once, its first slots are the ones in use.
        used = len(range(self.rank, min(int(self.pushed), self.size), self.world_size))
        for first in range(0, anchors.shape[0], tile_size):
            rows = slice(first, first + tile_size)
            scaled, offset = anchors[rows] * scale, (positives[rows] * scale)[:, None]
            for start in range(0, used, tile_size):
                columns = slice(start, min(start + tile_size, used))
                logits = (scaled @ negatives[columns].T).sub_(offset)
                own = world_index[rows, None] == self.index[columns]
                logits.masked_fill_(own, -torch.inf)
                total[rows] = torch.logaddexp(total[rows], torch.logsumexp(logits, 1))
                count[rows] += (columns.stop - columns.start) - own.sum(1)
        return total, count

    @torch.no_grad()
    def push(self, pairs: PairFeatures, world_index: Tensor) -> None:
        """Overwrite the oldest entries with all ranks' pairs. No communication: every rank has them already."""
        newest = slice(-min(self.size, pairs.global_size), None)
        count = world_index[newest].shape[0]
        slots = (self.pushed + torch.arange(count, device=self.index.device)) % self.size
        mine = slots % self.world_size == self.rank
        places = slots[mine] // self.world_size
        self.image[places] = pairs.world_image[newest][mine].to(self.image)
        self.text[places] = pairs.world_text[newest][mine].to(self.text)
        self.index[places] = world_index[newest][mine]
        self.pushed += count

    def flops(self, shape: BatchShape) -> int:
        """FLOPs of `log_sums` on one rank with a full queue: two products of 2 B (M/W) d."""
        return 2 * 2 * shape.global_size * self.image.shape[0] * shape.embed_dim

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's slots."""
        return {"queue_image": self.image, "queue_text": self.text, "queue_index": self.index}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Take over the slots of any number of ranks; raises ValueError if they are not of this size together."""
        for name, own in (("queue_image", self.image), ("queue_text", self.text), ("queue_index", self.index)):
            total = sum(state[name].shape[0] for state in states)
            if total != self.size:
                raise ValueError(f"queue: the checkpoint holds {total} pairs, this run's has {self.size} slots.")
            whole = own.new_empty((total, *own.shape[1:]))
            for rank, state in enumerate(states):
                whole[rank :: len(states)] = state[name].to(whole)
            own.copy_(whole[self.rank :: self.world_size])


def join_with_batch(queue_sums: Tensor, queue_count: Tensor, batch_rows: Tensor, global_size: int) -> Tensor:
    """log of the mean over queue and batch negatives together -> [b, 2].

    `queue_sums` [b, 2] and `queue_count` [b] from `EmbeddingQueue.log_sums`, `batch_rows` [b, 2] the batch's log g.
    """
    others = global_size - 1
    return torch.logaddexp(queue_sums, batch_rows + math.log(others)) - (queue_count + others).log()[:, None]
