"""Over how many ranks an engine spreads parameters, gradients and optimizer state, and the sizes that follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from torch import nn

from neuclip_scale.config import (
    ConfigError,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    Recipe,
    num_micro_batches,
)
from neuclip_scale.engines.zero_settings import read_settings
from neuclip_scale.models.building import plan_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.optim import parameter_groups

FP32, BF16 = 4, 2
ZERO_BUCKET = 500_000_000  # DeepSpeed's defaults of reduce_bucket_size,
ZERO_PERSISTENT = 100_000  # stage3_param_persistence_threshold
ZERO_REUSE = 1_000_000_000  # stage3_max_reuse_distance
ZERO_PREFETCH = 50_000_000  # and stage3_prefetch_bucket_size


@dataclass(frozen=True)
class Sharding:
    """An engine's layout over the ranks of a run."""

    label: str
    engine: str
    stage: int = 0
    """DeepSpeed's ZeRO stage."""
    parameters: int = 1
    """Ranks that hold one copy of the parameters together; likewise below."""
    gradients: int = 1
    optimizer: int = 1
    replicas: int = 1
    """FSDP2's copies of the whole."""
    master: bool = False
    """Whether the optimizer has an fp32 copy of the parameters besides."""
    parameters_on_host: bool = False
    optimizer_on_host: bool = False
    reduces_often: bool = False
    """Whether gradients travel after every micro-batch, and not after the last alone."""
    overlaps: bool = True
    """Whether the backward pass goes on while gradients travel."""
    bucket: int = 0
    """Elements of a buffer in which ZeRO's gradients travel, reduce_bucket_size."""
    num_buckets: int = 1
    """Two of them where communication overlaps."""
    persistent: int = 0
    """ZeRO 3 keeps parameters of fewer elements whole."""
    reuse: int = 0
    """ZeRO 3 keeps what is used again within so many elements."""
    prefetch: int = 0
    """Elements that ZeRO 3 fetches ahead."""


def sharding_of(config: Recipe, world_size: int) -> Sharding:
    """The layout of a recipe's engine on `world_size` ranks; raises `ConfigError`."""
    if config.engine.name == "fsdp2":
        return _fsdp2(config, world_size)
    if config.engine.name == "deepspeed":
        return _deepspeed(config, world_size)
    return Sharding("ddp", "ddp")


def _fsdp2(config: Recipe, world_size: int) -> Sharding:
    section = config.engine.fsdp
    if world_size % section.replicas:
        raise ConfigError("engine.fsdp.replicas", section.replicas, f"does not divide {world_size}", "Use a divisor.")
    shards = world_size // section.replicas
    whole = num_micro_batches(config, world_size) > 1 and not section.accumulate_sharded
    return Sharding(
        f"fsdp2, {section.replicas} x {shards} ranks",
        "fsdp2",
        parameters=shards,
        gradients=1 if whole else shards,
        optimizer=shards,
        replicas=section.replicas,
        reduces_often=section.accumulate_sharded,
        parameters_on_host=section.cpu_offload,
        optimizer_on_host=section.cpu_offload,
    )


def _deepspeed(config: Recipe, world_size: int) -> Sharding:
    zero = read_settings(config.engine.deepspeed.config).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    on_host = [zero.get(key, {}).get("device", "none") != "none" for key in ("offload_param", "offload_optimizer")]
    over = [world_size if stage >= least else 1 for least in (3, 2, 1)]
    return Sharding(
        f"deepspeed ZeRO {stage}",
        "deepspeed",
        stage,
        parameters=over[0],
        gradients=over[1],
        optimizer=over[2],
        master=stage > 0,
        parameters_on_host=on_host[0],
        optimizer_on_host=on_host[1],
        reduces_often=stage >= 2,
        overlaps=stage > 0 and bool(zero.get("overlap_comm", stage == 3)),
        bucket=int(zero.get("reduce_bucket_size", ZERO_BUCKET)) if stage else 0,
        num_buckets=2 if zero.get("overlap_comm", False) and stage < 3 else 1,
        persistent=int(zero.get("stage3_param_persistence_threshold", ZERO_PERSISTENT)),
        reuse=int(zero.get("stage3_max_reuse_distance", ZERO_REUSE)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", ZERO_PREFETCH)),
    )


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that FSDP2 gathers together."""

    shapes: tuple[tuple[tuple[int, ...], bool], ...]
    """Shape of each parameter, and whether it is trained."""
    is_block: bool
    is_reached: bool
    """Whether the backward pass goes through it."""
    tower: Literal["", "image", "text"] = ""
    """The tower of a block."""

    @property
    def size(self) -> int:
        """Elements."""
        return sum(math.prod(shape) for shape, _ in self.shapes)

    @property
    def is_trained(self) -> bool:
        """Whether any of them is."""
        return any(trained for _, trained in self.shapes)

    def padded(self, shards: int, *, trained_only: bool = False) -> int:
        """Elements that travel: each parameter cut along its first dimension into equal parts, the last padded."""
        chosen = [shape for shape, trained in self.shapes if trained or not trained_only]
        return sum(math.ceil(shape[0] / shards) * shards * math.prod(shape[1:]) for shape in chosen)


@dataclass(frozen=True)
class ModelSizes:
    """What of a model its sharding depends on."""

    groups: tuple[ParameterGroup, ...]
    """The blocks in the order they run, then what is in none of them."""
    low: tuple[tuple[int, bool, bool], ...]
    """Of each parameter: elements, whether it is trained, whether DeepSpeed sends it in the lower precision."""
    optimizer_groups: tuple[int, ...]
    """Trained elements of each of the optimizer's groups."""
    buffer_bytes: int
    embed_dim: int
    projected_widths: tuple[int, int]
    image_size: int
    context_length: int
    batch_norm: bool

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(size for size, _, _ in self.low)

    @property
    def trained(self) -> int:
        """Elements of those that are trained."""
        return sum(size for size, trained, _ in self.low if trained)

    @property
    def num_trained(self) -> int:
        """Tensors that are trained."""
        return sum(trained for _, trained, _ in self.low)

    @property
    def root(self) -> int:
        """Elements outside blocks: embeddings, projections, norms between."""
        return self.groups[-1].size

    @property
    def largest_block(self) -> int:
        """Elements of the largest block."""
        return max(group.size for group in self.groups[:-1])


def model_sizes(config: Recipe) -> ModelSizes:
    """Sizes of a recipe's model and of its optimizer's groups, from the meta device; once for each."""
    return _model_sizes(config.model, config.objective.name == "siglip", config.optim)


@lru_cache(maxsize=32)
def _model_sizes(section: ModelConfig, with_bias: bool, optim: OptimConfig) -> ModelSizes:
    model = planned(section, with_bias)
    low = {id(p) for part in model.modules() if type(part) in LOW_MODULES for p in part.parameters(recurse=False)}
    in_blocks = {id(p) for block in model.blocks() for p in block.parameters()}
    root = [p for p in model.parameters() if id(p) not in in_blocks]
    return ModelSizes(
        groups=(*_block_groups(model), _group(root, is_block=False, is_reached=True)),
        low=tuple((p.numel(), p.requires_grad, id(p) in low) for p in model.parameters()),
        optimizer_groups=tuple(sum(p.numel() for p in g["params"]) for g in parameter_groups(model, optim)),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        embed_dim=model.embed_dim,
        projected_widths=model.projected_widths,
        image_size=model.image_size,
        context_length=model.context_length,
        batch_norm=any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()),
    )


# DeepSpeed's default of torch_autocast.lower_precision_safe_modules; it does not take their subclasses.
LOW_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _block_groups(model: CLIP) -> Iterator[ParameterGroup]:
    image = set(map(id, model.visual.modules()))
    stems = {
        True: getattr(getattr(model.visual, "conv1", None), "weight", None),
        False: None if model.text is not None else model.token_embedding.weight,
    }
    reached = {tower: stem is not None and stem.requires_grad for tower, stem in stems.items()}
    for block in model.blocks():
        tower = id(block) in image
        reached[tower] |= any(p.requires_grad for p in block.parameters())
        group = _group(list(block.parameters()), is_block=True, is_reached=reached[tower])
        yield replace(group, tower="image" if tower else "text")


def _group(parameters: list[nn.Parameter], *, is_block: bool, is_reached: bool) -> ParameterGroup:
    return ParameterGroup(tuple((tuple(p.shape), p.requires_grad) for p in parameters), is_block, is_reached)


@lru_cache(maxsize=32)
def planned(section: ModelConfig, with_bias: bool) -> CLIP:
    """The model of a recipe's section on the meta device, to be looked at and not changed."""
    return plan_model(Recipe(model=section, objective=ObjectiveConfig(name="siglip" if with_bias else "openclip")))
