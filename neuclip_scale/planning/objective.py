"""Seconds of the objective: similarities and the NPN through Triton's kernels, everything else through torch."""

from __future__ import annotations

from neuclip_scale.config import Recipe, local_batch_size, matmul_precision
from neuclip_scale.objectives.base import MarginObjective
from neuclip_scale.objectives.exact import Exact
from neuclip_scale.objectives.neuclip import NeuCLIP
from neuclip_scale.objectives.neuclip_queue import NeuCLIPQueue
from neuclip_scale.planning.kernels import FP32, by_triton, item_size
from neuclip_scale.planning.normalizers import planned_objective
from neuclip_scale.planning.sharding import model_sizes
from neuclip_scale.planning.site import Site
from neuclip_scale.similarity import BatchShape

SLOWER = {"medium": 1, "high": 2, "highest": 6}
"""Time of a product in bf16 products: TF32, and fp32 as three of TF32."""
NPN_SLOWER = {"medium": 1.0, "high": 1.14, "highest": 2.3}
"""The same of a whole NPN, whose exponentials take as long in each; measured on an H200 (npn_h200.json)."""
UPDATE_LAUNCHES, PREDICTION_LAUNCHES = 4, 2
"""Kernels of one network."""
TORCH_PASSES = 4
"""Times an entry of a product of torch's is read or written."""


def objective_time(config: Recipe, site: Site, encoding: int, encoders: float) -> tuple[int, float]:
    """FLOPs of a rank's objective in a step and their seconds. `encoding` are FLOPs of a pair's forward pass, and
    `encoders` is their speed, for objectives that encode the data set.
    """
    d = model_sizes(config).embed_dim
    shape = BatchShape(local_batch_size(config, site.world_size), config.train.global_batch_size, d)
    objective = planned_objective(config, d, site.dataset_size)
    estimate = objective.estimate_flops(shape) if isinstance(objective, MarginObjective) else 0
    similarities, again = objective.flops(shape) - estimate, 0
    if isinstance(objective, NeuCLIPQueue):  # planned as on one rank
        estimate //= site.world_size
    if isinstance(objective, Exact):  # planned without its encoder
        again = encoding * site.dataset_size // objective.refresh_every
    count = similarities + estimate + again
    if isinstance(objective, NeuCLIP):
        return count, _similarities(similarities, shape, config, site) + _npn(estimate, shape, config, site)
    if site.measured.objective:
        return count, count / site.measured.objective
    seconds = _similarities(similarities, shape, config, site) + again / encoders
    if isinstance(objective, NeuCLIPQueue) and by_triton(d):  # nothing square goes through memory
        return count, seconds + estimate / _speed(config, site)
    return count, seconds + _by_torch(estimate, d, config, site)


def _similarities(flops: int, shape: BatchShape, config: Recipe, site: Site) -> float:
    if site.measured.objective:
        return flops / site.measured.objective
    if not by_triton(shape.embed_dim):
        return _by_torch(flops, shape.embed_dim, config, site)
    # Weights are written in one sweep and read for both sides, or written and read in a sweep for each side.
    passes = 3 if shape.is_whole else 4
    weights = passes * item_size(config) * shape.local_size * shape.global_size
    return max(flops / _speed(config, site), weights / (site.gpu.bandwidth * site.assume.memory))


def _speed(config: Recipe, site: Site) -> float:
    """FLOP/s of Triton's products of similarities."""
    return site.gpu.peak("bf16") / SLOWER[matmul_precision(config.train)] * site.assume.objective_compute


def _npn(flops: int, shape: BatchShape, config: Recipe, site: Site) -> float:
    """Updates and predictions of both sides; with few anchors, the host that starts their kernels."""
    npn, d = config.objective.npn, shape.embed_dim
    if not by_triton(d) and not site.measured.normalizer:
        return _by_torch(flops, d, config, site)
    slower = NPN_SLOWER[matmul_precision(config.train)]
    measured, precision = site.measured.normalizer, site.measured.normalizer_precision
    if measured and precision:
        measured *= NPN_SLOWER[precision] / slower
    rate = measured or site.gpu.peak("bf16") * site.assume.npn_compute / slower
    launches = 2 * (UPDATE_LAUNCHES * npn.updates_per_step + PREDICTION_LAUNCHES)
    return max(flops / rate, launches * site.assume.npn_launch_us * 1e-6)


def _by_torch(flops: int, d: int, config: Recipe, site: Site) -> float:
    """Products of what is held in fp32, whose results go through memory."""
    exact = matmul_precision(config.train) == "highest"
    peak = site.gpu.peak("fp32") if exact else site.gpu.peak("bf16") / SLOWER["high"]
    entries = flops / (2 * d)
    memory = TORCH_PASSES * FP32 * entries / (site.gpu.bandwidth * site.assume.memory)
    return max(flops / (peak * site.assume.objective_compute), memory)
