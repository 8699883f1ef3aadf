"""What a run will hold in each rank's memory, worked out on the meta device before anything is queued."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from neuclip_scale.config import ConfigError, Recipe, check_recipe, local_batch_size, micro_batch_size
from neuclip_scale.engines.zero_settings import read_settings
from neuclip_scale.models.building import plan_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.transformer import Transformer
from neuclip_scale.objectives import create_objective
from neuclip_scale.objectives.registry import Problem

FP32, BF16 = 4, 2
ZERO_BUCKET = 500_000_000  # DeepSpeed's default of reduce_bucket_size
# BatchNorm refuses a single value per channel, so two pairs are the least.
_PAIRS = 2


@dataclass(frozen=True)
class MemoryItem:
    """One thing that lies in a rank's memory."""

    name: str
    device: int
    """Bytes on the device that trains."""
    host: int
    """Bytes in the host's memory instead: what is offloaded."""
    how: str
    """Where the figure comes from."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one rank of a run."""

    engine: str
    world_size: int
    parameters: int
    """Elements of the model."""
    trained: int
    """Of these, what is trained."""
    items: list[MemoryItem]

    @property
    def device(self) -> int:
        """Bytes on each device, without the allocator's own and the framework's."""
        return sum(item.device for item in self.items)

    @property
    def host(self) -> int:
        """Bytes of each rank in the host's memory, without the data loader's."""
        return sum(item.host for item in self.items)

    def document(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "device_bytes": self.device, "host_bytes": self.host}


@dataclass(frozen=True)
class _Sharding:
    """Over how many ranks each kind of state is spread, and what lies in the host's memory."""

    label: str
    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1
    master: bool = False
    """Whether the optimizer has an fp32 copy of the parameters besides."""
    parameters_on_host: bool = False
    optimizer_on_host: bool = False
    bucket: int = 0
    """Elements of the buffers in which gradients travel."""


def plan_memory(config: Recipe, world_size: int, dataset_size: int = 0) -> MemoryPlan:
    """Memory of each rank of `config` on `world_size` ranks; nothing is allocated. Raises `ConfigError`.

    `dataset_size` is n, for objectives that keep something for every pair. Parameters, gradients and optimizer state
    follow ZeRO's formula (arXiv 1910.02054) in fp32; activations are what autograd saves, counted by running the model
    on the meta device.
    """
    check_recipe(config, world_size)
    model = plan_model(config)
    sharding = _sharding(config, world_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    items = [
        *_state(config, sharding, total, trained),
        *_gathered(config, sharding, model),
        _activations(config, model, world_size),
        *_contrast(config, model.embed_dim, world_size),
        _objective(config, model.embed_dim, world_size, dataset_size),
    ]
    return MemoryPlan(sharding.label, world_size, total, trained, items)


def _sharding(config: Recipe, world_size: int) -> _Sharding:
    name = config.engine.name
    if name == "fsdp2":
        section = config.engine.fsdp
        if world_size % section.replicas:
            raise ConfigError(
                "engine.fsdp.replicas", section.replicas, f"does not divide {world_size}", "Use a divisor."
            )
        shards = world_size // section.replicas
        several = micro_batch_size(config, world_size) < local_batch_size(config, world_size)
        whole = several and not section.accumulate_sharded
        label = f"fsdp2, {section.replicas} x {shards} ranks"
        offload = section.cpu_offload
        return _Sharding(label, shards, 1 if whole else shards, shards, False, offload, offload)
    if name == "deepspeed":
        zero = read_settings(config.engine.deepspeed.config).get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        on_host = [zero.get(key, {}).get("device", "none") != "none" for key in ("offload_param", "offload_optimizer")]
        over = [world_size if stage >= least else 1 for least in (3, 2, 1)]
        bucket = int(zero.get("reduce_bucket_size", ZERO_BUCKET)) * (2 if zero.get("overlap_comm", stage == 3) else 1)
        label = f"deepspeed ZeRO {stage}"
        return _Sharding(label, over[0], over[1], over[2], stage > 0, on_host[0], on_host[1], bucket if stage else 0)
    return _Sharding("ddp")


def _state(config: Recipe, sharding: _Sharding, total: int, trained: int) -> list[MemoryItem]:
    def item(name: str, size: int, shards: int, on_host: bool, how: str) -> MemoryItem:
        part = math.ceil(size / shards)
        over = f", over {shards} ranks" if shards > 1 else ""
        return MemoryItem(name, 0 if on_host else part, part if on_host else 0, how + over)

    words = 2 + (1 if sharding.master else 0)
    found = [
        item("parameters", FP32 * total, sharding.parameters, sharding.parameters_on_host, "4 bytes each"),
        item("gradients", FP32 * trained, sharding.gradients, sharding.optimizer_on_host, "4 bytes each"),
        item(
            "optimizer",
            words * FP32 * trained,
            sharding.optimizer,
            sharding.optimizer_on_host,
            "AdamW's two moments" + (" and the master copy" if sharding.master else ""),
        ),
    ]
    if sharding.bucket:
        how = "ZeRO's reduce_bucket_size, at most the gradients"
        found.append(MemoryItem("reduction buckets", FP32 * min(sharding.bucket, trained), 0, how))
    if config.optim.ema_decay:
        found.append(
            item("running average", FP32 * trained, sharding.parameters, sharding.parameters_on_host, "4 bytes each")
        )
    return found


def _gathered(config: Recipe, sharding: _Sharding, model: CLIP) -> list[MemoryItem]:
    """Whole parameters for the time they are used: the largest block and the one fetched ahead, and what is in none."""
    if sharding.parameters == 1:
        return []
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks()]
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    width = BF16 if config.train.precision == "bf16" and config.engine.name == "fsdp2" else FP32
    size = 2 * max(sizes) * width + rest * FP32
    return [MemoryItem("gathered parameters", size, 0, "two blocks, embeddings and projections at a time")]


def _activations(config: Recipe, model: CLIP, world_size: int) -> MemoryItem:
    pairs = micro_batch_size(config, world_size)
    low = config.train.precision != "fp32"
    per_pair = saved_bytes(model.to(torch.bfloat16) if low else model)
    return MemoryItem(
        "activations",
        math.ceil(per_pair * pairs),
        0,
        f"{pairs} pairs of {per_pair / 2**20:.1f} MiB in {config.train.precision}",
    )


def saved_bytes(model: CLIP) -> float:
    """Bytes that autograd keeps for one pair between forward and backward, of a model on the meta device.

    Blocks under gradient checkpointing keep their inputs, and the largest of them all it needs while it is run again.
    Attention keeps its scores here, which a fused kernel does not.
    """
    images = torch.zeros(_PAIRS, 3, model.image_size, model.image_size, device="meta")
    tokens = torch.zeros(_PAIRS, model.context_length, dtype=torch.int64, device="meta")
    inputs, again = 0, 0
    measured: set[tuple[int, ...]] = set()

    def measure(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal inputs, again
        (x,) = arguments
        inputs += x.nbytes
        if tuple(x.shape) not in measured:
            measured.add(tuple(x.shape))
            with _Saved(block) as saved:
                block.forward(x.detach().requires_grad_())
            again = max(again, saved.bytes)

    handles = [block.register_forward_pre_hook(measure) for block in model.blocks() if _is_checkpointed(model, block)]
    with _Saved(model) as saved:
        output = model.train()(images, tokens)
    del output
    for handle in handles:
        handle.remove()
    return (saved.bytes + inputs + again) / _PAIRS


class _Saved:
    """Counts what autograd keeps inside for the backward pass, beside parameters; views of one tensor count once."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {id(parameter) for parameter in module.parameters()}
        self._held: dict[int, Tensor] = {}  # held, so that an id stays its tensor's
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Sum over distinct tensors."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if id(whole) not in self._parameters:
            self._held[id(whole)] = whole
        return tensor


def _is_checkpointed(model: CLIP, block: nn.Module) -> bool:
    """Whether the block is one of a `Transformer` of ours that checkpoints its blocks."""
    return any(
        isinstance(part, Transformer) and part.grad_checkpointing and any(block is each for each in part.resblocks)
        for part in model.modules()
    )


def _contrast(config: Recipe, d: int, world_size: int) -> list[MemoryItem]:
    b, B = local_batch_size(config, world_size), config.train.global_batch_size
    tile = min(config.objective.tile_size, b)
    return [
        MemoryItem(
            "features and their gradients", FP32 * 2 * d * (2 * b + B), 0, f"[{b}, {d}] twice and [{B}, {d}], two sides"
        ),
        MemoryItem("similarity tiles", FP32 * 3 * tile * min(config.objective.tile_size, B), 0, "three at a time"),
    ]


def _objective(config: Recipe, d: int, world_size: int, dataset_size: int) -> MemoryItem:
    problem = Problem(
        embed_dim=d,
        dataset_size=dataset_size or None,
        num_epochs=config.train.num_steps * config.train.global_batch_size / dataset_size if dataset_size else None,
        global_batch_size=config.train.global_batch_size,
    )
    with torch.device("meta"):
        objective = create_objective(config.objective, problem)
    replicated = objective.state_dict().keys()  # what is sharded is not persistent
    size = 0
    for name, tensor in [*objective.named_buffers(), *objective.named_parameters()]:
        size += math.ceil(tensor.nbytes / (1 if name in replicated else world_size))
    return MemoryItem("normalizers", size, 0, f"state of {config.objective.name}: tables and queues over the ranks")
