"""NeuCLIP: the global contrastive loss with normalizers predicted by the NPN (arXiv 2511.08417)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from neuclip_scale.config import NPNConfig
from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.normalizers import NormalizerPredictionNetwork, RecentPairs
from neuclip_scale.objectives.base import MarginObjective
from neuclip_scale.sections import section
from neuclip_scale.similarity import BatchShape, PairFeatures
from neuclip_scale.transfers import to_device


class NeuCLIP(MarginObjective):
    """L = tau/B sum_i [ exp(-a_i)(eps + g_i) + a_i - 1 ] over both sides + 2 rho tau, a from two NPNs.

    Each step: a restart every T_r steps, T_u updates of the prototypes on this batch with the encoders held fixed,
    then a from the updated prototypes. The batch joins the store of recent pairs last, so that a restart from it
    never takes prototypes from the batch it is used on.
    """

    def __init__(
        self, embed_dim: int, section: NPNConfig, *, rho: float, eps: float, tile_size: int, seed: int = 0
    ) -> None:
        super().__init__(rho=rho, eps=eps, tile_size=tile_size)
        self.section, self.seed = section, seed
        self.image_npn = NormalizerPredictionNetwork(embed_dim, section.num_prototypes, eps)  # prototypes are texts
        self.text_npn = NormalizerPredictionNetwork(embed_dim, section.num_prototypes, eps)  # prototypes are images
        for npn in (self.image_npn, self.text_npn):
            npn.replays.enabled = section.cuda_graphs
        self.recent = RecentPairs(embed_dim, section.num_prototypes)

    def estimate_flops(self, shape: BatchShape) -> int:
        """See `MarginObjective.estimate_flops`. A restart copies embeddings and multiplies nothing."""
        npns = self.image_npn, self.text_npn
        return sum(npn.flops(shape.local_size, self.section.updates_per_step) for npn in npns)

    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `MarginObjective.estimate`."""
        if world_index is None:
            # Rows of this step count as samples of their own, so that nobody meets a prototype made from itself.
            world_index = self.samples_seen + torch.arange(pairs.global_size, device=pairs.image.device)
        if self.training and self._restart_is_due():
            self._restart(pairs, world_index)
        index = pairs.local_rows(world_index) if self.section.exclude_own else None
        positives, temperature = pairs.positives(), 1 / scale
        sides = [
            (npn, features.to(scale.dtype))
            for npn, features in ((self.image_npn, pairs.image), (self.text_npn, pairs.text))
        ]
        if self.training:
            updates = [
                npn.updates(
                    anchors,
                    positives,
                    temperature,
                    batch_rows[:, side],
                    index,
                    num_updates=self.section.updates_per_step,
                    learning_rate=self.section.learning_rate,
                    tile_size=self.tile_size,
                )
                for side, (npn, anchors) in enumerate(sides)
            ]
            with section("npn/update"):
                # In turns: while one side's gradient travels, the other's is computed.
                for _ in itertools.zip_longest(*updates):
                    pass
        rows = torch.empty_like(batch_rows)
        with section("npn/predict"):
            for side, (npn, anchors) in enumerate(sides):
                rows[:, side] = npn(anchors, positives, temperature, index, tile_size=self.tile_size)
        if self.training:
            with section("npn/restart"):  # what the next one is made from
                newest = torch.arange(pairs.global_size, device=world_index.device)[-self.recent.capacity :]
                self.recent.push(*pairs.world_rows(newest), world_index[newest])
        return rows, all_gather_rows(rows), {}

    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """exp(-a)(eps + g) + a - 1."""
        return (self.add_eps(batch_rows) - rows).exp() + rows - 1

    def _restart_is_due(self) -> bool:
        every = self.section.restart_every
        return self.num_steps == 0 or (every > 0 and self.num_steps % every == 0)

    @section("npn/restart")
    def _restart(self, pairs: PairFeatures, world_index: Tensor) -> None:
        """Fresh prototypes: past pairs first, then this batch, repeated as often as it takes."""
        m = self.section.num_prototypes
        past = min(len(self.recent), m) if self.section.prototype_source == "recent" else 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_steps)
        order = torch.randperm(pairs.global_size, generator=generator)
        rows = to_device(order.repeat(-(-(m - past) // pairs.global_size))[: m - past], world_index.device)
        own_image, own_text = pairs.world_rows(rows)
        text = torch.cat([self.recent.text[:past], own_text.to(self.recent.text)])
        image = torch.cat([self.recent.image[:past], own_image.to(self.recent.image)])
        index = torch.cat([self.recent.index[:past], world_index[rows]])
        self.image_npn.restart(text, index, reset_accumulator=self.section.reset_accumulator)
        self.text_npn.restart(image, index, reset_accumulator=self.section.reset_accumulator)
