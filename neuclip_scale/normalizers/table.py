"""FastCLIP's table: one running estimate per pair and side, sharded over the ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from neuclip_scale import distributed


class NormalizerTable(nn.Module):
    """log u for both sides of every pair of the data set, keyed by the dense sample index.

    Rank r holds the indices congruent to r modulo the world size: 8 bytes a pair over all ranks together. An entry
    that was never visited is -inf. Equation: u <- (1 - gamma) u + gamma g, u <- g at the first visit (FastCLIP, arXiv
    2407.01445), kept in log space so that nothing overflows at small temperatures.
    """

    log_u: Tensor

    def __init__(self, dataset_size: int, *, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__()
        self.dataset_size = dataset_size
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        owned = len(range(self.rank, dataset_size, self.world_size))
        # Not persistent: the shards of all ranks make one table, which checkpoints keep per rank.
        self.register_buffer("log_u", torch.full((owned, 2), -torch.inf), persistent=False)

    @torch.no_grad()
    def update(self, world_index: Tensor, world_log_g: Tensor, gamma: float) -> Tensor:
        """Mix the newest estimates of the whole batch in and return the new log u (collective).

        `world_index` [B] dense sample indices, `world_log_g` [B, 2] both sides' log g -> [B, 2].
        """
        mine = world_index % self.world_size == self.rank
        slots, newest = world_index[mine] // self.world_size, world_log_g[mine].to(self.log_u.dtype)
        old = self.log_u[slots]
        # log(0) = -inf is what gamma = 1 needs, but math.log refuses it.
        keep, take = (math.log1p(-gamma) if gamma < 1 else -math.inf), math.log(gamma)
        mixed = torch.logaddexp(old + keep, newest + take)
        self.log_u[slots] = torch.where(torch.isinf(old), newest, mixed)
        return self._collect(mine, self.log_u[slots])

    @torch.no_grad()
    def lookup(self, world_index: Tensor) -> Tensor:
        """Stored log u of the whole batch, -inf where never visited, [B] -> [B, 2] (collective)."""
        mine = world_index % self.world_size == self.rank
        return self._collect(mine, self.log_u[world_index[mine] // self.world_size])

    def _collect(self, mine: Tensor, values: Tensor) -> Tensor:
        # Every row has one owner, so the sum over ranks is exact. exp/log would lose range: sum the values
        # themselves, with -inf carried as the most negative finite number.
        rows = self.log_u.new_zeros((mine.shape[0], 2))
        rows[mine] = values.clamp_min(torch.finfo(values.dtype).min)
        distributed.all_reduce_sum(rows)
        return torch.where(rows == torch.finfo(rows.dtype).min, -torch.inf, rows)

    def load_shards(self, shards: list[Tensor]) -> None:
        """Take over a table saved by any number of ranks, in rank order; raises ValueError if sizes do not add up."""
        total = sum(shard.shape[0] for shard in shards)
        if total != self.dataset_size:
            raise ValueError(
                f"u table: the checkpoint holds {total} pairs, this run's data has {self.dataset_size}. "
                "Resume with the shards the run was started on."
            )
        whole = self.log_u.new_empty((total, 2))
        for rank, shard in enumerate(shards):
            whole[rank :: len(shards)] = shard.to(whole)
        self.log_u.copy_(whole[self.rank :: self.world_size])
