"""Seconds of a training step by a roofline: the slowest of arithmetic, memory and network, each at a stated share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from neuclip_scale.config import ModelConfig, Recipe, local_batch_size, pairs_encoded_again
from neuclip_scale.objectives.exact import Exact
from neuclip_scale.objectives.neuclip_queue import NeuCLIPQueue
from neuclip_scale.planning.normalizers import planned_objective
from neuclip_scale.planning.sharding import FP32, model_sizes, planned, sharding_of
from neuclip_scale.planning.site import Site
from neuclip_scale.planning.traffic import Transfer, plan_traffic
from neuclip_scale.similarity import BatchShape
from neuclip_scale.telemetry.flops import EncoderFlops, count_encoder_flops

_TILE_PASSES = 16
"""Times an entry of the similarities is read or written, over both directions' sums and gradients."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what it computes on each rank."""

    encoders: float
    objective: float
    update: float
    communication: float
    """What computation waits for."""
    hidden: float
    """What runs beside the encoders, in full."""
    exposed: float
    """What of that does not fit beside them."""
    model_flops: int
    """Both towers forward and backward, nothing twice, on each rank."""
    hardware_flops: int
    """As they are run."""
    objective_flops: int
    mfu: float
    """Model FLOPs over the whole step's time and the GPU's peak."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.encoders + self.objective + self.update + self.communication + self.exposed


def plan_time(config: Recipe, site: Site, transfers: list[Transfer] | None = None) -> StepTime:
    """Time of a step of `config` at a site. Nothing is measured."""
    assume, W = site.assume, site.world_size
    if transfers is None:
        transfers = plan_traffic(config, W, site.dataset_size)
    b = local_batch_size(config, W)
    flops = encoder_flops(config.model)
    hardware = flops.executed(b, pairs_encoded_again(config, W))
    peak = site.gpu.peak(config.train.precision)
    encoders = hardware / (peak * assume.compute)
    objective_flops, objective = _objective(config, site, flops)
    hidden, waited = (
        sum(seconds_of(transfer, site) for transfer in transfers if transfer.exposed is kind) for kind in (False, True)
    )
    exposed = max(0.0, hidden - assume.overlap * encoders)
    parts = encoders, objective, _update(config, site), waited
    model = b * flops.training
    mfu = model / ((sum(parts) + exposed) * peak)
    return StepTime(*parts, hidden, exposed, model, hardware, objective_flops, mfu)


def seconds_of(transfer: Transfer, site: Site) -> float:
    """Time of all calls of a collective."""
    assume = site.assume
    bandwidth = site.bandwidth(transfer.ranks, transfer.group) * assume.interconnect
    latency = assume.latency_us * 1e-6 * math.log2(transfer.ranks) if transfer.ranks > 1 else 0.0
    return transfer.sent / bandwidth + transfer.calls * latency


@lru_cache(maxsize=32)
def encoder_flops(section: ModelConfig) -> EncoderFlops:
    """FLOPs of a pair, once for each model."""
    return count_encoder_flops(planned(section, False))


def _objective(config: Recipe, site: Site, flops: EncoderFlops) -> tuple[int, float]:
    sizes, B, W = model_sizes(config), config.train.global_batch_size, site.world_size
    shape = BatchShape(local_batch_size(config, W), B, sizes.embed_dim)
    objective = planned_objective(config, sizes.embed_dim, site.dataset_size)
    count, entries = objective.flops(shape), _TILE_PASSES * shape.local_size * B
    if isinstance(objective, NeuCLIPQueue):  # planned as on one rank
        queue = objective.estimate_flops(shape)
        count += queue // W - queue
    if isinstance(objective, Exact):  # planned without its encoder
        count += flops.forward * site.dataset_size // objective.refresh_every
    arithmetic = count / (site.gpu.peak("fp32") * site.assume.objective_compute)
    return count, max(arithmetic, FP32 * entries / (site.gpu.bandwidth * site.assume.memory))


def _update(config: Recipe, site: Site) -> float:
    """AdamW reads value, gradient and two moments and writes three of them: seven words of each element."""
    sharding = sharding_of(config, site.world_size)
    own = model_sizes(config).trained / sharding.optimizer
    words = 7 * FP32 * own
    if not sharding.optimizer_on_host:
        return words / (site.gpu.bandwidth * site.assume.memory)
    ranks = min(site.gpus_per_node, site.world_size)
    there_and_back = 2 * FP32 * own / (site.gpu.pcie * site.assume.interconnect)
    return there_and_back + ranks * words / site.assume.host_bandwidth
