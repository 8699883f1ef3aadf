"""NeuCLIP's objective with normalizers from a queue of past embeddings joined with the batch; this project's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuclip_scale.config import QueueConfig
from neuclip_scale.distributed import all_gather_rows, all_reduce_sum
from neuclip_scale.normalizers import EmbeddingQueue, HorizonMixture, ProjectingQueue, horizons_up_to, join_with_batch
from neuclip_scale.objectives.base import MarginObjective
from neuclip_scale.sections import section
from neuclip_scale.similarity import BatchShape, PairFeatures

STEPS_IN_QUEUE = 16
MOST_STEPS, MOST_STEPS_ANEW = 128, 256
ENOUGH_PAIRS = 8192


def default_size(global_batch_size: int | None, dataset_size: int | None, *, project_anew: bool) -> int:
    """M: the pairs of the last 16 steps, or if these are less than 8192 that many, but of no more than 128 steps, or
    256 where pairs are mapped anew and so age more slowly; at most the data set. 8192 for an unknown batch size.

    How many of them count is found while training; more than this would cost more than the NPN (docs/normalizers.md).
    """
    size = ENOUGH_PAIRS
    if global_batch_size:
        most = MOST_STEPS_ANEW if project_anew else MOST_STEPS
        size = max(STEPS_IN_QUEUE * global_batch_size, min(size, most * global_batch_size))
    return min(size, dataset_size) if dataset_size else size


class NeuCLIPQueue(MarginObjective):
    """L = tau/B sum_i [ exp(-a_i)(eps + g_i) + a_i - 1 ] over both sides + 2 rho tau, a from the queue.

    No network: the queue's similarities hold for any tau, and an anchor never meets its own pair. Past pairs weigh
    exp(-age/h), in the mixture of horizons h that has explained the last batches best, or alike if not `forget`. With
    `batch_weight` w, a = log((1 - w) exp(a) + w g). With `projected_widths` past pairs go through the towers' last maps
    as these stand now.
    """

    def __init__(
        self,
        embed_dim: int,
        section: QueueConfig,
        *,
        size: int,
        global_batch_size: int,
        projected_widths: tuple[int, int] | None,
        rho: float,
        eps: float,
        tile_size: int,
    ) -> None:
        super().__init__(rho=rho, eps=eps, tile_size=tile_size)
        self.batch_weight, self.join_batch = section.batch_weight, section.join_batch
        self.queue = (
            EmbeddingQueue(embed_dim, size) if projected_widths is None else ProjectingQueue(projected_widths, size)
        )
        horizons = horizons_up_to(size, global_batch_size) if section.forget else torch.tensor([torch.inf])
        self.horizon = HorizonMixture(horizons)

    @property
    def needs_projections(self) -> bool:
        """See `Objective.needs_projections`."""
        return isinstance(self.queue, ProjectingQueue)

    def estimate_flops(self, shape: BatchShape) -> int:
        """See `MarginObjective.estimate_flops`; with a full queue."""
        return self.queue.flops(shape, len(self.horizon.horizons))

    @section("normalizers/queue")
    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `MarginObjective.estimate`; afterwards the batch teaches the horizons' weights and joins the queue."""
        if world_index is None:
            # Rows of this step count as samples of their own, so that nobody meets its own embedding.
            world_index = self.samples_seen + torch.arange(pairs.global_size, device=pairs.image.device)
        sums = self.queue.sums(pairs, scale, world_index, self.horizon.horizons, tile_size=self.tile_size)
        past, known = sums.log_means()
        rows = join_with_batch(sums, batch_rows, pairs.global_size)
        if not self.join_batch:  # an empty queue has no mean: the batch stands in
            rows = torch.where(known[:, None], past, rows)
        rows = self.horizon.mix(rows)
        if self.batch_weight:
            w = self.batch_weight
            rows = torch.logaddexp(rows + math.log1p(-w), batch_rows + math.log(w)) if w < 1 else batch_rows
        rows = self.add_eps(rows)
        if self.training:
            self._learn_horizons(self.add_eps(past), known.all(1), batch_rows)
            self.queue.push(pairs, world_index)
        return rows, all_gather_rows(rows), {"normalizer/horizon": self.horizon.mean_horizon(self.queue.size)}

    def _learn_horizons(self, past: Tensor, known: Tensor, batch_rows: Tensor) -> None:
        """From the anchors that have a past for each horizon (collective). past [b, 2, H], known [b]."""
        gradients = self.horizon.gradients(past, self.add_eps(batch_rows))
        gradients = torch.where(known[:, None, None], gradients, 0.0)
        total = all_reduce_sum(torch.cat([gradients.sum(0).flatten(), known.sum().to(gradients).reshape(1)]))
        self.horizon.learn(total[:-1].view_as(self.horizon.weights), total[-1])

    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """exp(-a)(eps + g) + a - 1."""
        return (self.add_eps(batch_rows) - rows).exp() + rows - 1

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's slots of the queue."""
        return self.queue.rank_state()

    def load_rank_states(self, states: list[dict[str, Tensor]]) -> None:
        """See `Objective.load_rank_states`."""
        self.queue.load_rank_states(states)
