"""State kept for every pair of the data set, sharded over the ranks; FastCLIP's running estimates are one use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neuclip_scale import distributed


class SampleTable(nn.Module):
    """A row of numbers for each sample, keyed by the dense sample index.

    Rank r holds the indices congruent to r modulo the world size, so that all ranks together hold one copy.
    """

    padded: Tensor

    def __init__(
        self, dataset_size: int, initial: Sequence[float], *, rank: int | None = None, world_size: int | None = None
    ) -> None:
        """`initial` is the row that every sample begins with."""
        super().__init__()
        self.dataset_size = dataset_size
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        owned = len(range(self.rank, dataset_size, self.world_size))
        # Not persistent: the shards of all ranks make one table, which checkpoints keep per rank.
        self.register_buffer("padded", torch.tensor(initial).repeat(owned + 1, 1), persistent=False)

    @property
    def rows(self) -> Tensor:
        """This rank's rows, sharing their memory."""
        return self.padded[:-1]

    def places(self, world_index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the samples [B] are this rank's, [B] bool, and where the rows of all stand in `padded`, [B].

        Samples of other ranks are given the row behind the last, which nobody reads: choosing those that are this
        rank's would make the host wait for their number.
        """
        mine = world_index % self.world_size == self.rank
        return mine, torch.where(mine, world_index // self.world_size, self.padded.shape[0] - 1)

    def collect(self, mine: Tensor, values: Tensor) -> Tensor:
        """Values [B, c], right where `mine`, -> those of all samples (collective).

        Every row has one owner, so the sum over ranks is exact. -inf travels as the most negative finite number.
        """
        rows = torch.where(mine[:, None], values.clamp_min(torch.finfo(values.dtype).min), 0.0)
        distributed.all_reduce_sum(rows)
        return torch.where(rows == torch.finfo(rows.dtype).min, -torch.inf, rows)

    def load_shards(self, shards: list[Tensor]) -> None:
        """Take over a table saved by any number of ranks, in rank order; raises ValueError if sizes do not add up."""
        total = sum(shard.shape[0] for shard in shards)
        if total != self.dataset_size:
            raise ValueError(
                f"table over the samples: the checkpoint holds {total} pairs, this run's data has {self.dataset_size}. "
                "Resume with the shards the run was started on."
            )
        whole = self.rows.new_empty((total, self.rows.shape[1]))
        for rank, shard in enumerate(shards):
            whole[rank :: len(shards)] = shard.to(whole)
        self.rows.copy_(whole[self.rank :: self.world_size])


class NormalizerTable(SampleTable):
    """log u for both sides of every pair: 8 bytes a pair over all ranks together.

    An entry that was never visited is -inf. Equation: u <- (1 - gamma) u + gamma g, u <- g at the first visit
    (FastCLIP, arXiv 2407.01445), kept in log space so that nothing overflows at small temperatures.
    """

    def __init__(self, dataset_size: int, *, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__(dataset_size, (-math.inf, -math.inf), rank=rank, world_size=world_size)

    @torch.no_grad()
    def update(self, world_index: Tensor, world_log_g: Tensor, gamma: float) -> Tensor:
        """Mix the newest estimates of the whole batch in and return the new log u (collective).

        `world_index` [B] dense sample indices, `world_log_g` [B, 2] both sides' log g -> [B, 2].
        """
        mine, places = self.places(world_index)
        old, newest = self.padded[places], world_log_g.to(self.padded.dtype)
        # log(0) = -inf is what gamma = 1 needs, but math.log refuses it.
        keep, take = (math.log1p(-gamma) if gamma < 1 else -math.inf), math.log(gamma)
        mixed = torch.logaddexp(old + keep, newest + take)
        self.padded[places] = torch.where(torch.isinf(old), newest, mixed)
        return self.collect(mine, self.padded[places])

    @torch.no_grad()
    def lookup(self, world_index: Tensor) -> Tensor:
        """Stored log u of the whole batch, -inf where never visited, [B] -> [B, 2] (collective)."""
        mine, places = self.places(world_index)
        return self.collect(mine, self.padded[places])
