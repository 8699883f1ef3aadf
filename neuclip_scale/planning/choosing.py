"""The recipe as it stands on some machines, what else would fit there, and which of all is fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from neuclip_scale.config import ConfigError, Recipe, local_batch_size, micro_batch_size, num_micro_batches
from neuclip_scale.planning.kernels import has_tiles
from neuclip_scale.planning.memory import GIB, MemoryPlan, plan_memory
from neuclip_scale.planning.sharding import model_sizes
from neuclip_scale.planning.site import Site
from neuclip_scale.planning.timing import StepTime, plan_time
from neuclip_scale.planning.traffic import Transfer, plan_traffic

SMALLEST_TILE = 128
NEARLY = 1.02
"""Of ways this close to the fastest, the one that changes least is chosen."""
Overrides = dict[str, Any]
LESS_MEMORY = tuple(f"engine.fsdp.{name}" for name in ("reshard_after_forward", "accumulate_sharded", "cpu_offload"))
FSDP2: Overrides = {"engine.name": "fsdp2", **dict.fromkeys(LESS_MEMORY, False)}
ENGINES: tuple[Overrides, ...] = (
    {"engine.name": "ddp"},
    *({**FSDP2, **dict.fromkeys(LESS_MEMORY[:count], True)} for count in range(len(LESS_MEMORY) + 1)),
    *({"engine.name": "deepspeed", "engine.deepspeed.config": name} for name in ("zero1", "zero2", "zero3")),
    *({"engine.name": "deepspeed", "engine.deepspeed.config": f"zero{stage}_offload"} for stage in (2, 3)),
)
"""Ways to spread the encoders that are tried, from the one that keeps most on each GPU."""


@dataclass(frozen=True)
class Option:
    """One way to run the recipe, and whether it fits."""

    overrides: Overrides
    """What differs from the recipe."""
    config: Recipe
    memory: MemoryPlan
    transfers: list[Transfer]
    time: StepTime
    problem: str
    """Why it does not fit; empty if it does."""

    @property
    def fits(self) -> bool:
        """Whether it can run there."""
        return not self.problem

    @property
    def sent(self) -> int:
        """Bytes that each rank sends in a step."""
        return sum(transfer.sent for transfer in self.transfers)


@dataclass(frozen=True)
class Choice:
    """What was found."""

    recipe: Option
    """The recipe as it stands."""
    best: Option | None
    """The fastest of all that fit; None if nothing does."""
    options: list[Option]
    """The best of each way, those that fit first, the fastest first."""


def choose(config: Recipe, site: Site, *, alternatives: bool = True) -> Choice:
    """Try the recipe as it is, then every engine with and without checkpointing, each with the largest micro-batch and
    tile that fit. Raises `ConfigError` for a recipe that cannot run on so many ranks.
    """
    recipe = consider(config, site, {})
    found = [recipe, *(_alternatives(config, site) if alternatives else ())]
    options = sorted(found, key=lambda option: (not option.fits, round(option.time.seconds, 3)))
    fastest = options[0]
    if not fastest.fits:
        return Choice(recipe, None, options)
    near = [option for option in options if option.fits and option.time.seconds <= NEARLY * fastest.time.seconds]
    return Choice(recipe, min(near, key=lambda option: len(option.overrides)), options)


def _alternatives(config: Recipe, site: Site) -> Iterator[Option]:
    seen = set()
    for engine in _engines(config, site):
        for checkpointing in (False, True):
            try:
                option = largest(config, site, {**engine, "model.grad_checkpointing": checkpointing})
            except ConfigError:  # an engine or a tower that does not take the combination
                continue
            # With one micro-batch there is nothing to accumulate: two ways are one.
            sizes = option.memory.device, option.memory.host, option.sent, option.memory.engine
            if sizes not in seen and option.overrides:
                seen.add(sizes)
                yield option


def consider(config: Recipe, site: Site, overrides: Overrides) -> Option:
    """One way; raises `ConfigError`."""
    changed = with_values(config, overrides)
    memory = plan_memory(changed, site.world_size, site.dataset_size)
    transfers = plan_traffic(changed, site.world_size, site.dataset_size)
    differs = {name: value for name, value in overrides.items() if value_of(config, name) != value}
    if changed.engine.name == "ddp":
        differs = {name: value for name, value in differs.items() if not name.startswith("engine.fsdp")}
    time = plan_time(changed, site, transfers)
    return Option(differs, changed, memory, transfers, time, _problem(memory, site))


def _problem(memory: MemoryPlan, site: Site) -> str:
    if memory.device > site.gpu.memory:
        needs, has = memory.device / GIB, site.gpu.memory / GIB
        return f"{needs:,.1f} GiB of {has:,.1f} on each GPU ({memory.moment})"
    on_node = memory.host * min(site.gpus_per_node, site.world_size)
    if on_node > site.assume.host_gib * GIB:
        return f"{on_node / GIB:,.0f} GiB of {site.assume.host_gib:,.0f} in each node's own memory"
    return ""


def _engines(config: Recipe, site: Site) -> Iterator[Overrides]:
    for engine in ENGINES:
        if engine["engine.name"] != "ddp" and config.train.precision == "fp16":
            continue
        if engine["engine.name"] == "deepspeed" and config.optim.name != "adamw":
            continue
        offloads = engine.get("engine.fsdp.cpu_offload") or "offload" in engine.get("engine.deepspeed.config", "")
        if site.world_size == 1 and engine["engine.name"] != "ddp" and not offloads:
            continue
        yield {"engine.fsdp.cpu_offload": False, "engine.fsdp.replicas": 1, **engine}
        # Shards within a node, copies over nodes: parameters do not cross the network.
        if engine["engine.name"] == "fsdp2" and site.nodes > 1 and site.world_size % site.nodes == 0:
            yield {**engine, "engine.fsdp.replicas": site.nodes}


def largest(config: Recipe, site: Site, overrides: Overrides) -> Option:
    """With the largest micro-batch that fits, and then the activations that can be kept: fewer gatherings, fuller
    kernels. The smallest micro-batch where none fits. Raises `ConfigError`.
    """
    tried, fits = overrides, False
    for micro in _micro_batch_sizes(config, site):
        first_kept = {"train.kept_micro_batches": 1, "train.kept_tower": ""}
        tried, fits = _with_tiles(config, site, {**overrides, **first_kept, "train.micro_batch_size": micro})
        if fits:
            break
    option = consider(config, site, tried)
    return _with_kept_activations(config, site, option) if fits else option


def _with_kept_activations(config: Recipe, site: Site, option: Option) -> Option:
    """The same where what memory is left keeps most activations, so that least is encoded twice."""
    several, best = num_micro_batches(option.config, site.world_size), option
    for tower in ("", "text", "image") if several > 1 else ():
        least, most = 0, several - 1
        while least <= most:
            kept = (least + most + 1) // 2
            values = {"train.kept_micro_batches": kept, "train.kept_tower": tower}
            tried = consider(config, site, {**option.overrides, **values})
            least, most = (kept + 1, most) if tried.fits else (least, kept - 1)
            if tried.fits and tried.time.seconds < best.time.seconds:
                best = tried
    return best


def _with_tiles(config: Recipe, site: Site, overrides: Overrides) -> tuple[Overrides, bool]:
    """The overrides, with smaller tiles where these are what does not fit; and whether all fits then."""
    tile = config.objective.tile_size if has_tiles(config, model_sizes(config).embed_dim) else SMALLEST_TILE
    while True:
        memory = plan_memory(with_values(config, overrides), site.world_size, site.dataset_size)
        fits = not _problem(memory, site)
        if fits or tile <= SMALLEST_TILE or memory.moment not in ("normalizers", "similarities"):
            return overrides, fits
        tile //= 2
        overrides = {**overrides, "objective.tile_size": tile}


def _micro_batch_sizes(config: Recipe, site: Site) -> list[int]:
    """From the local batch downwards by halves. BatchNorm's numbers depend on it: there the recipe's comes first."""
    local, own = local_batch_size(config, site.world_size), micro_batch_size(config, site.world_size)
    size = own if model_sizes(config).batch_norm else local
    found = [size]
    while size > 8:
        size = -(-size // 2)
        found.append(size)
    if own not in found:
        found.append(own)
    return sorted(found, reverse=True)


def value_of(config: Any, name: str) -> Any:
    """The field of a recipe called `section.field`."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_values(config: Any, overrides: Overrides) -> Any:
    """The recipe with other values of some fields."""
    for name, value in overrides.items():
        config = _with_value(config, name.split("."), value)
    return config


def _with_value(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(section, **{first: _with_value(getattr(section, first), rest, value) if rest else value})
