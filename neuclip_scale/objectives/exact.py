"""RGCL-g with the exact normalizers: what every estimate is an estimate of, as a way to train. For studies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.distributed import all_gather_rows
from neuclip_scale.normalizers import DatasetFeatures, exact_log_normalizers
from neuclip_scale.objectives.base import MarginObjective
from neuclip_scale.sections import section
from neuclip_scale.similarity import BatchShape, PairFeatures


class Exact(MarginObjective):
    """L = tau/B sum_i [ exp(-a_i)(eps + g_i) + a_i - 1 ] over both sides + 2 rho tau, a over the whole data set.

    Every step encodes all n pairs, so a step takes n/B times as long: an upper bound for what a true normalizer can
    do, and no method for large data. With `refresh_every` k, features are up to k - 1 steps old.
    """

    def __init__(
        self,
        encode: Callable[[], DatasetFeatures],
        *,
        encode_flops: int,
        dataset_size: int,
        refresh_every: int,
        rho: float,
        eps: float,
        tile_size: int,
    ) -> None:
        """`encode` gives all pairs' features (collective); `encode_flops` is what that takes on this rank."""
        super().__init__(rho=rho, eps=eps, tile_size=tile_size)
        self._encode, self._encode_flops = encode, encode_flops
        self.dataset_size, self.refresh_every, self.eps = dataset_size, refresh_every, eps
        self._features: DatasetFeatures | None = None

    def estimate_flops(self, shape: BatchShape) -> int:
        """See `MarginObjective.estimate_flops`; with the encoding, spread over the steps between two."""
        products = 2 * 2 * shape.local_size * self.dataset_size * shape.embed_dim
        return products + self._encode_flops // self.refresh_every

    @section("normalizers/exact")
    def estimate(
        self, pairs: PairFeatures, scale: Tensor, batch_rows: Tensor, world_index: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `MarginObjective.estimate`; an anchor's own pair is left out by its sample index."""
        if world_index is None:
            raise ValueError("exact: sample_index is missing; it says which pair is the anchor's own.")
        if self._features is None or self.num_steps % self.refresh_every == 0:
            self._features = self._encode()
        # A checkpoint's are wherever it was read.
        self._features = features = DatasetFeatures(*(each.to(pairs.image.device) for each in self._features))
        places = features.positions(pairs.local_rows(world_index))
        rows = torch.stack(
            exact_log_normalizers(
                pairs.image.to(scale.dtype), pairs.text.to(scale.dtype), places, features.image, features.text,
                1 / scale, eps=self.eps, tile_size=self.tile_size, dtype=scale.dtype,
            ),
            1,
        )  # fmt: skip
        return rows, all_gather_rows(rows), {}

    def values(self, rows: Tensor, batch_rows: Tensor) -> Tensor:
        """exp(-a)(eps + g) + a - 1."""
        return (self.add_eps(batch_rows) - rows).exp() + rows - 1

    def get_extra_state(self) -> dict[str, Any]:
        """Counters, and the features where later steps still use them."""
        kept = self.refresh_every > 1 and self._features is not None
        return {**super().get_extra_state(), "features": tuple(self._features or ()) if kept else ()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_extra_state`."""
        super().set_extra_state(state)
        self._features = DatasetFeatures(*state["features"]) if state["features"] else None
