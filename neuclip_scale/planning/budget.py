"""What a whole run takes: steps, days, GPU-hours, energy, money, storage."""

from __future__ import annotations

from dataclasses import dataclass

from neuclip_scale.config import ConfigError, Recipe
from neuclip_scale.config import num_steps as steps_over
from neuclip_scale.planning.normalizers import ALL_FEATURES, WORKSPACE, normalizer_items
from neuclip_scale.planning.sharding import FP32, model_sizes
from neuclip_scale.planning.site import Site
from neuclip_scale.planning.timing import StepTime

# Pairs that the authors of a packaged recipe's data set could download (its YAML file), or DataComp's pools in full.
KNOWN_SETS = {
    "cc3m": 2_723_840,
    "cc12m": 9_187_328,
    "dfn14m": 13_710_637,
    "dfn192m": 192_160_462,
    "datacomp_small": 12_800_000,
    "datacomp_medium": 128_000_000,
    "datacomp_large": 1_280_000_000,
    "datacomp_xlarge": 12_800_000_000,
}


def dataset_size(config: Recipe, given: int = 0) -> int:
    """Pairs of the recipe's data set: as given, or a packaged recipe's; 0 where neither tells."""
    if given < 0:
        raise ConfigError("--dataset-size", given, "no number of pairs", "Leave it out, or give the pairs of the set.")
    return given or KNOWN_SETS.get(config.name, 0)


def num_steps(config: Recipe, num_pairs: int) -> int:
    """Optimizer steps of a run; raises `ConfigError` where its length follows from data that are not known."""
    train = config.train
    if not train.num_steps and not num_pairs:
        raise ConfigError(
            "train.num_steps", 0, "the length follows from the data set's size, which is not known here",
            "Give --dataset-size PAIRS, or train.num_steps.",
        )  # fmt: skip
    return steps_over(config, num_pairs)


@dataclass(frozen=True)
class Budget:
    """A whole run, from the first step to the last."""

    num_steps: int
    samples_seen: int
    dataset_size: int
    """Pairs; those seen, where the set's size is not known."""
    seconds_per_step: float
    samples_per_second: float
    days: float
    gpu_hours: float
    energy_kwh: float
    price: float | None
    """None where the price of a GPU-hour was not given."""
    data_bytes: int
    read_bytes: int
    """Read from the shards over the run."""
    egress_price: float | None
    """Of reading the data set once from a remote store; None where no price was given."""
    checkpoint_bytes: int
    """One checkpoint."""
    kept_checkpoint_bytes: int
    """All that lie there at a time, the one being written included."""
    model_flops: int
    """Of the run over all ranks."""


def plan_budget(config: Recipe, site: Site, time: StepTime) -> Budget:
    """Cost of a run whose steps take `time`."""
    assume, steps = site.assume, num_steps(config, site.dataset_size)
    seen = steps * config.train.global_batch_size
    hours = steps * time.seconds * (1 + assume.overhead) / 3600
    gpu_hours = hours * site.world_size
    watts = site.gpu.arithmetic.watts * assume.power + assume.node_watts_per_gpu
    pairs = site.dataset_size or seen
    data = round(pairs * assume.sample_kb * 1000)
    one = _checkpoint(config, site.dataset_size)
    section = config.checkpoint
    kept = section.keep + 1 + (steps // section.keep_every_steps if section.keep_every_steps else 0)
    return Budget(
        num_steps=steps,
        samples_seen=seen,
        dataset_size=pairs,
        seconds_per_step=time.seconds,
        samples_per_second=config.train.global_batch_size / time.seconds,
        days=hours / 24,
        gpu_hours=gpu_hours,
        energy_kwh=gpu_hours * watts * assume.pue / 1000,
        price=gpu_hours * site.price if site.price else None,
        data_bytes=data,
        read_bytes=round(seen * assume.sample_kb * 1000),
        egress_price=data / 1e9 * site.egress_price if site.egress_price else None,
        checkpoint_bytes=one,
        kept_checkpoint_bytes=kept * one,
        model_flops=steps * time.model_flops * site.world_size,
    )


def _checkpoint(config: Recipe, num_pairs: int) -> int:
    """Values, two moments, and the average where there is one; the objective's state once."""
    sizes = model_sizes(config)
    items = normalizer_items(config, sizes.embed_dim, 1, num_pairs)
    objective = sum(item.device for item in items if item.name not in (WORKSPACE, ALL_FEATURES))
    return FP32 * (sizes.total + (3 if config.optim.ema_decay else 2) * sizes.trained) + objective
