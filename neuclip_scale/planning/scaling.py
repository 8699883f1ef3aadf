"""Steps of a recipe over numbers of GPUs, engines and networks: strong scaling (B fixed), weak (pairs a GPU fixed)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from neuclip_scale.config import ConfigError, Recipe, local_batch_size, micro_batch_size, num_micro_batches
from neuclip_scale.planning.budget import dataset_size
from neuclip_scale.planning.choosing import Option, Overrides, largest, value_of, with_values
from neuclip_scale.planning.links import link_time
from neuclip_scale.planning.site import Site, check_assumptions
from neuclip_scale.planning.sweep import ENGINES, HYBRID, Sweep, check_sweep, with_interconnect
from neuclip_scale.planning.timing import StepTime, plan_time

Regime = Literal["strong", "weak"]
REGIMES: tuple[Regime, ...] = ("strong", "weak")
VARIED = (
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.kept_micro_batches",
    "train.kept_tower",
    "data.num_streams",
    "engine.name",
    "engine.fsdp.replicas",
    "engine.deepspeed.config",
    "objective.tile_size",
)
STOPS = (0.8, 0.5)
"""Shares of what a GPU does at best under which scaling is said to weaken and to stop."""


@dataclass(frozen=True)
class Point:
    """A step on some GPUs."""

    world_size: int
    global_batch_size: int
    local_batch_size: int
    micro_batch_size: int
    num_micro_batches: int
    memory: int
    """Bytes on each GPU."""
    problem: str
    """Why it does not fit; empty if it does."""
    overrides: Overrides
    """What differs from the recipe."""
    time: StepTime
    late: tuple[str, ...]
    """Collectives of whose time more than half is latency."""

    @property
    def pairs_per_second(self) -> float:
        """Of all GPUs together."""
        return self.global_batch_size / self.time.seconds

    @property
    def rate(self) -> float:
        """Pairs a second of each GPU."""
        return self.pairs_per_second / self.world_size

    def parts(self) -> dict[str, float]:
        """Where the seconds of the step go: computing of each kind, and each collective waited for."""
        time = self.time
        own = {
            "encoders": time.encoders - time.starting,
            "starting operations": time.starting,
            "objective": time.objective,
            "update": time.update,
        }
        return {name: seconds for name, seconds in {**own, **time.waits}.items() if seconds > 1e-9}


@dataclass(frozen=True)
class Line:
    """One engine on one network, over numbers of GPUs, as far as it fits."""

    regime: Regime
    engine: str
    interconnect: str
    points: tuple[Point, ...]
    """In the order of GPUs; those that do not fit too."""

    @property
    def fitting(self) -> tuple[Point, ...]:
        """Points that can run."""
        return tuple(point for point in self.points if not point.problem)

    @property
    def best(self) -> Point:
        """Where a GPU does the most: not always the smallest number, which may have to encode everything twice."""
        return max(self.fitting, key=lambda point: point.rate)

    def efficiency(self, point: Point) -> float:
        """Pairs a second of a GPU there, of those at the smallest number of GPUs that fits."""
        return point.rate / self.fitting[0].rate

    def stop(self, share: float) -> Point | None:
        """The first point beyond the best where a GPU does less than `share` of what it does there."""
        best = self.best
        beyond = (point for point in self.fitting if point.world_size > best.world_size)
        return next((point for point in beyond if point.rate < share * best.rate), None)

    def losses(self, point: Point) -> dict[str, float]:
        """Why a GPU does less than at the best point: GPU-seconds of a pair that each part takes more of there than
        here, as shares of all that grew, the largest first.
        """
        before, now = ({name: spent / each.local_batch_size for name, spent in each.parts().items()}
                       for each in (self.best, point))  # fmt: skip
        grown = {name: spent - before.get(name, 0.0) for name, spent in now.items()}
        whole = sum(spent for spent in grown.values() if spent > 0)
        shares = {name: spent / whole for name, spent in grown.items() if spent > 0}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class ScalingPlan:
    """Everything that was worked out."""

    recipe: Recipe
    site: Site
    """Its GPU, dataset and assumptions; its number of GPUs and its network are varied."""
    sweep: Sweep
    lines: tuple[Line, ...]
    skipped: dict[str, str]
    """Points that cannot run whatever the memory, and why."""

    @property
    def fits(self) -> bool:
        """Whether anything can run."""
        return any(line.fitting for line in self.lines)


def plan_scaling(config: Recipe, site: Site, sweep: Sweep) -> ScalingPlan:
    """Plan every combination; raises `ConfigError` for one that no number of GPUs can run, or options that are wrong.

    The recipe is taken as it stands but for the engine and the micro-batch, which is the largest that fits.
    """
    check_assumptions(site.assume)
    check_sweep(sweep)
    site = dataclasses.replace(site, dataset_size=dataset_size(config, site.dataset_size))
    pairs = sweep.pairs_per_gpu or micro_batch_size(config, min(sweep.gpus))
    lines: list[Line] = []
    skipped: dict[str, str] = {}
    for regime in REGIMES:
        for engine in sweep.engines:
            options = list(_options(config, site, sweep, regime, engine, pairs, skipped))
            for network in sweep.interconnects:
                points = tuple(_point(config, option, with_interconnect(place, network)) for place, option in options)
                if points:
                    lines.append(Line(regime, engine, network, points))
    if not lines:
        raise ConfigError("--gpus", sweep.gpus, "; ".join(skipped.values()), "Give other numbers of GPUs.")
    return ScalingPlan(config, site, dataclasses.replace(sweep, pairs_per_gpu=pairs), tuple(lines), skipped)


def _options(
    config: Recipe, site: Site, sweep: Sweep, regime: Regime, engine: str, pairs: int, skipped: dict[str, str]
) -> Iterator[tuple[Site, Option]]:
    for world_size in sweep.gpus:
        place = dataclasses.replace(site, world_size=world_size)
        if regime == "strong" and config.train.global_batch_size % world_size:
            problem = f"{config.train.global_batch_size:,} pairs do not divide over {world_size:,} GPUs"
            skipped[f"strong, {world_size:,} GPUs"] = problem
            continue
        overrides = {**_sizes(config, world_size, pairs if regime == "weak" else 0), **ENGINES[engine]}
        if engine == HYBRID:
            overrides["engine.fsdp.replicas"] = place.nodes
        try:
            yield place, largest(with_values(config, overrides), place, {})
        except ConfigError as error:
            skipped[f"{regime}, {engine}, {world_size:,} GPUs"] = str(error)


def _sizes(config: Recipe, world_size: int, pairs: int) -> Overrides:
    """The batch; a micro-batch that is not above the local one; and streams, which decide the order of the data alone,
    as many as there are GPUs where the recipe's do not suit.
    """
    batch, streams = pairs * world_size or config.train.global_batch_size, config.data.num_streams
    if streams % world_size or batch % streams:
        streams = world_size
    micro = min(config.train.micro_batch_size, batch // world_size)
    return {"train.global_batch_size": batch, "train.micro_batch_size": micro, "data.num_streams": streams}


def _point(config: Recipe, option: Option, site: Site) -> Point:
    chosen, W = option.config, site.world_size
    times = {transfer.name: link_time(transfer, site) for transfer in option.transfers}
    return Point(
        world_size=W,
        global_batch_size=chosen.train.global_batch_size,
        local_batch_size=local_batch_size(chosen, W),
        micro_batch_size=micro_batch_size(chosen, W),
        num_micro_batches=num_micro_batches(chosen, W),
        memory=option.memory.device,
        problem=option.problem,
        overrides={name: value_of(chosen, name) for name in VARIED if value_of(config, name) != value_of(chosen, name)},
        time=plan_time(chosen, site, option.transfers),
        late=tuple(name for name, time in times.items() if time.latency > time.sending),
    )
