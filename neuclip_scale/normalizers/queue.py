"""A queue of past embeddings as negatives of the normalizers, older ones counting less, sharded over the ranks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.normalizers.own_entries import OwnEntries
from neuclip_scale.normalizers.rounded import Rounded
from neuclip_scale.similarity import BatchShape, PairFeatures
from neuclip_scale.similarity.choosing import Kernels, choose
from neuclip_scale.transfers import to_device

KERNELS = Kernels("queue with {} entries", "neuclip_scale.normalizers.triton_queue_check")
LEAST_WEIGHT = 1e-3
"""Weights that add up to less are what rounding left when an anchor's own pair was taken out."""


class QueueSums(NamedTuple):
    """Weighted sums over the queue for this rank's anchors, one column for each of H horizons."""

    log_sums: Tensor  # [b, 2, H], image and text anchors
    weights: Tensor  # [b, H], what the weights of the summed entries add up to

    def log_means(self) -> tuple[Tensor, Tensor]:
        """log of the weighted means [b, 2, H], and where there is something to take a mean of [b, H]; else 0."""
        known = self.weights > LEAST_WEIGHT
        return torch.where(known[:, None], self.log_sums - self.weights.log()[:, None], 0.0), known


class EmbeddingQueue(nn.Module):
    """The last M pairs of all ranks: both embeddings and the sample index; rank r keeps the slots congruent to r.

    An entry with p younger pairs in the queue weighs exp(-p / h) for a horizon of h pairs. Sums of anchor i:

        sum_q w_q exp((x_i . q - s_ii)/tau)   and   sum_q w_q,   q no own pair of i from an earlier epoch

    The p-th pair ever pushed stands in slot p mod M, so the union over ranks does not depend on their number. Each rank
    sums over its slots for all ranks' anchors: work and memory per rank are those of a queue of M/W entries, but for
    the weights of every age (8 M H bytes).
    """

    image: Tensor
    text: Tensor
    index: Tensor
    pushed: Tensor

    def __init__(
        self, width: int | tuple[int, int], size: int, *, rank: int | None = None, world_size: int | None = None
    ) -> None:
        """`width` of an entry: the embeddings', or one for the image and one for the text side; `size` is M."""
        super().__init__()
        image_width, text_width = (width, width) if isinstance(width, int) else width
        self.size = size
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        owned = len(range(self.rank, size, self.world_size))
        self.register_buffer("image", torch.zeros(owned, image_width), persistent=False)
        self.register_buffer("text", torch.zeros(owned, text_width), persistent=False)
        # -1: an empty slot
        self.register_buffer("index", torch.full((owned,), -1, dtype=torch.int64), persistent=False)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self._pushed: int | None = 0
        """The same number on the host, where sizes come from; None until it is read after loading."""
        self._table: tuple[Tensor, Tensor] | None = None
        """Horizons and the weights that they give to each age, [2 M, H]."""
        self._rounded_image, self._rounded_text = Rounded(), Rounded()  # empty but for Triton's bf16 products
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "_pushed", None))

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of an entry's image and text side."""
        return self.image.shape[1], self.text.shape[1]

    @property
    def num_pushed(self) -> int:
        """Pairs pushed so far; reading it waits for the device once after loading a checkpoint."""
        if self._pushed is None:
            self._pushed = int(self.pushed)
        return self._pushed

    @property
    def num_filled(self) -> int:
        """Slots in use, of all ranks: the first ones until the queue has filled once."""
        return min(self.num_pushed, self.size)

    @torch.no_grad()
    def sums(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor, horizons: Tensor, *, tile_size: int
    ) -> QueueSums:
        """For every horizon of `horizons` [H], in pairs; infinity lets all count alike (collective).

        `scale` is 1/tau, one element. Both sides leave out the same entries. One all-to-all of [B, 3 H].
        """
        positives = pairs.world_positives()
        weights = self.weights_of(horizons.to(positives))
        anchors = self.anchors(pairs)
        if all(choose(KERNELS, entries).name == "triton" for entries in (self.image, self.text)):
            from neuclip_scale.normalizers.triton_queue import FusedSums

            own = OwnEntries(self.index[: len(weights)], world_index)
            fused = FusedSums(positives, scale, own, weights)
            image = fused.log_sums(anchors[0], self.text, self._rounded_text)
            text = fused.log_sums(anchors[1], self.image, self._rounded_image)
            partial = torch.stack([image, text, own.sums_of_others(weights)], 1)
        else:
            partial = self.sweep(anchors, positives, scale, world_index, weights, tile_size)
        partial = distributed.exchange_rows(partial)  # [W, b, 3, H]
        log_sums = partial[:, :, :2]
        return QueueSums(log_sums[0] if len(partial) == 1 else torch.logsumexp(log_sums, 0), partial[:, :, 2].sum(0))

    def weights_of(self, horizons: Tensor) -> Tensor:
        """w of this rank's slots in use, [M/W, H]: a view of a table that is made once for the same horizons."""
        if self._table is None or self._table[0] is not horizons:
            younger = torch.arange(self.size - 1, -1, -1, device=horizons.device).to(horizons)
            self._table = horizons, torch.exp(-younger[:, None] / horizons).repeat(2, 1)
        # Row k holds the weight of the entry with M - 1 - k younger ones, twice over, for slots go round.
        first = -self.num_pushed % self.size
        return self._table[1][first + self.rank : first + self.num_filled : self.world_size]

    def sweep(
        self,
        anchors: tuple[Tensor, Tensor],
        positives: Tensor,
        scale: Tensor,
        world_index: Tensor,
        weights: Tensor,
        tile_size: int,
    ) -> Tensor:
        """By torch, over this rank's slots, [B, 3, H]: log sum_q w_q exp(scale (x_i . q - s_ii)) of image and text
        anchors, and sum_q w_q; `weights` [K, H].
        """
        count, num_horizons = weights.shape
        total = positives.new_full((len(positives), 3, num_horizons), -torch.inf)
        total[:, 2] = 0
        # Few anchors: longer tiles of as many numbers, since every tile has its calls.
        width = max(tile_size, tile_size**2 // max(len(positives), 1))
        for first in range(0, len(positives), tile_size):
            rows = slice(first, first + tile_size)
            offset = (positives[rows] * scale)[:, None]
            scaled = [side[rows] * scale for side in anchors]
            for start in range(0, count, width):
                columns = slice(start, min(start + width, count))
                own = world_index[rows, None] == self.index[columns]
                # The few horizons as rows of the products: a quarter of the time on a CPU.
                horizon_rows = weights[columns].T
                for side, negatives in enumerate((self.text, self.image)):
                    part = _log_sums(scaled[side], negatives[columns], own, horizon_rows).sub_(offset)
                    total[rows, side] = torch.logaddexp(total[rows, side], part) if start else part
                total[rows, 2] += (horizon_rows @ (~own).to(weights).T).T
        return total

    def anchors(self, pairs: PairFeatures) -> tuple[Tensor, Tensor]:
        """Whose products with entries are similarities: of the image side [B, text width], of the text side."""
        return pairs.world_image, pairs.world_text

    def entries(self, pairs: PairFeatures, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of the world's pairs `rows` [k] -> image, text [k, width]. No communication here, for every
        rank has these already.
        """
        return pairs.world_rows(rows)

    @torch.no_grad()
    def push(self, pairs: PairFeatures, world_index: Tensor) -> None:
        """Overwrite the oldest entries with all ranks' pairs; communicates as `entries` does."""
        count = min(self.size, pairs.global_size)
        slots = (self.num_pushed + np.arange(count)) % self.size
        mine = np.flatnonzero(slots % self.world_size == self.rank)  # on the host, which so waits for no device
        newest = to_device(torch.from_numpy(pairs.global_size - count + mine), self.index.device)
        places = to_device(torch.from_numpy(slots[mine] // self.world_size), self.index.device)
        image, text = self.entries(pairs, newest)
        self._rounded_image.write(self.image, places, image.to(self.image))
        self._rounded_text.write(self.text, places, text.to(self.text))
        self.index[places] = world_index[newest]
        self.pushed += count
        self._pushed = self.num_pushed + count

    def flops(self, shape: BatchShape, num_horizons: int) -> int:
        """FLOPs of `sums` on one rank with a full queue: two products of 2 B (M/W) (width + H), and one of 2 B (M/W) H
        for the sums of weights, which Triton's path does without.
        """
        return 2 * shape.global_size * len(self.index) * (sum(self.widths) + 3 * num_horizons)

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's slots."""
        return {"queue_image": self.image, "queue_text": self.text, "queue_index": self.index}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Take over the slots of any number of ranks; raises ValueError if they are not of this size together."""
        for name, own in self.rank_state().items():
            if name not in states[0]:
                raise ValueError(
                    f"queue: the checkpoint has no {name}: set objective.queue.project_anew as it was there. If it is, "
                    "an older version wrote it, and this one needs another run_dir."
                )
            total = sum(state[name].shape[0] for state in states)
            if total != self.size:
                raise ValueError(
                    f"queue: the checkpoint holds {total} pairs, not {self.size}: set objective.queue.size to {total}."
                )
            whole = own.new_empty((total, *own.shape[1:]))
            for rank, state in enumerate(states):
                whole[rank :: len(states)] = state[name].to(whole)
            own.copy_(whole[self.rank :: self.world_size])


def _log_sums(scaled: Tensor, negatives: Tensor, own: Tensor, horizon_rows: Tensor) -> Tensor:
    """log sum_q w_q exp(scale x_i . q) of one tile, [rows, H]; its logits [rows, columns] end with it."""
    logits = scaled @ negatives.T
    logits.masked_fill_(own, -torch.inf)
    # Finite also for an anchor that leaves out the whole tile.
    largest = logits.amax(1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return (horizon_rows @ logits.sub_(largest).exp_().T).T.log_().add_(largest)


def join_with_batch(queue: QueueSums, batch_rows: Tensor, global_size: int) -> Tensor:
    """log of the weighted mean over queue and batch negatives together, those of the batch weighing 1 -> [b, 2, H].

    `batch_rows` [b, 2] is the batch's log g.
    """
    others = global_size - 1
    batch = (batch_rows + math.log(others))[..., None]
    return torch.logaddexp(queue.log_sums, batch) - (queue.weights + others).log()[:, None]
