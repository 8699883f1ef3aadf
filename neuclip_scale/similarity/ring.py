"""Similarities of a batch that no rank holds: blocks of [b, d] travel around a ring of the ranks.

Each rank multiplies its rows with a block while it sends that on to the next rank and receives another from the one
before, so of all features it holds three blocks of both sides instead of [B, d]. Statistics take one round and
gradients another. A rank adds up its own rows only, since their gradients need no more of the others than features and
what is gathered anyway, [B] of log-normalizers: nothing has to travel back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.similarity.pairs import PairFeatures
from neuclip_scale.similarity.sigmoid import SigmoidSums
from neuclip_scale.similarity.tiled import RowSums


class RingPairs(PairFeatures):
    """This rank's pairs, of a batch over all ranks of the process group: what asks for others is a collective."""

    @classmethod
    def local(cls, image: Tensor, text: Tensor) -> RingPairs:
        """Of this rank's embeddings, [b, d]; every rank has as many."""
        return cls(image, text, image[:0], text[:0], distributed.rank() * image.shape[0])

    @property
    def global_size(self) -> int:
        """B."""
        return self.local_size * distributed.world_size()

    @property
    def is_whole(self) -> bool:
        """Never: each direction has its own sweep."""
        return False

    def world_positives(self) -> Tensor:
        """See `PairFeatures.world_positives`; collective."""
        return distributed.all_gather_rows(self.positives())

    def world_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `PairFeatures.world_rows`; collective. Every row is its owner's, to which the others add zeros."""
        own = rows - self.offset
        mine = (own >= 0) & (own < self.local_size)
        found = []
        for features in (self.image, self.text):
            chosen = features.new_zeros(len(rows), features.shape[1])
            chosen[mine] = features[own[mine]]
            found.append(distributed.all_reduce_sum(chosen))
        return found[0], found[1]


@dataclass(frozen=True)
class Block(PairFeatures):
    """This rank's pairs beside those of one rank, which stand for the world.

    Tables of rows, as shifts, hold those of that rank and after them this one's: `local_rows` are the last.
    """

    owner: int = 0

    @property
    def is_whole(self) -> bool:
        """Each direction has its own sweep, also where both ranks are the same."""
        return False

    @property
    def has_positives(self) -> bool:
        """Only this rank's own pairs meet their partners."""
        return self.owner == distributed.rank()

    def local_rows(self, world_rows: Tensor) -> Tensor:
        """See the class."""
        return world_rows[-self.local_size :]

    def tables(self, world: Tensor) -> Tensor:
        """What `local_rows` and columns expect, from a [B, ...] tensor."""
        b = self.local_size
        own = distributed.rank() * b
        return torch.cat([world[self.owner * b : (self.owner + 1) * b], world[own : own + b]])


def blocks(pairs: RingPairs) -> Iterator[Block]:
    """Every rank's pairs once, this rank's first, then those of the ranks before it (collective)."""
    W, rank = distributed.world_size(), distributed.rank()
    image, text = pairs.image.contiguous(), pairs.text.contiguous()
    for hop in range(W):
        last = hop == W - 1
        travel = None if last else distributed.pass_on([image, text])
        # A row's partner lies beyond the end of another rank's block.
        offset = 0 if hop == 0 else pairs.local_size
        yield Block(pairs.image, pairs.text, image, text, offset, owner=(rank - hop) % W)
        if travel is not None:
            image, text = travel()


def logsumexp(pairs: RingPairs, of_block: Callable[[Block], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`pair_logsumexp` over all blocks, given that of one."""
    image, text = (pairs.image.new_full((pairs.local_size,), -torch.inf, dtype=_wide(pairs)) for _ in range(2))
    for block in blocks(pairs):
        own_image, own_text = of_block(block)
        image, text = torch.logaddexp(image, own_image), torch.logaddexp(text, own_text)
    return image, text


def row_sums(pairs: RingPairs, of_block: Callable[[Block], tuple[RowSums, RowSums]]) -> tuple[RowSums, RowSums]:
    """`pair_row_sums` over all blocks, given that of one."""
    empty = pairs.image.new_full((pairs.local_size,), -torch.inf, dtype=_wide(pairs))
    image = text = RowSums(empty, torch.zeros_like(empty))
    for block in blocks(pairs):
        own_image, own_text = of_block(block)
        image, text = _joined(image, own_image), _joined(text, own_text)
    return image, text


def gradients(pairs: RingPairs, of_block: Callable[[Block], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`pair_gradients` over all blocks, given that of one."""
    image, text = _added_up(map(of_block, blocks(pairs)))
    return image, text


def sigmoids(pairs: RingPairs, of_block: Callable[[Block], SigmoidSums]) -> SigmoidSums:
    """`pair_sigmoids` over all blocks, given that of one."""
    return SigmoidSums(*_added_up(map(of_block, blocks(pairs))))


def _added_up(parts: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
    total = list(next(parts))
    for part in parts:
        for sum_, more in zip(total, part, strict=True):
            sum_ += more
        del part  # else it would be held beside the next one
    return total


def _joined(sums: RowSums, more: RowSums) -> RowSums:
    total = torch.logaddexp(sums.logsumexp, more.logsumexp)
    finite = total.clamp_min(torch.finfo(total.dtype).min)  # a row without an entry yet: exp(-inf) of it counts
    mean = sums.mean * (sums.logsumexp - finite).exp() + more.mean * (more.logsumexp - finite).exp()
    return RowSums(total, mean)


def _wide(pairs: PairFeatures) -> torch.dtype:
    return torch.promote_types(pairs.image.dtype, torch.float32)
