"""What a rank holds in memory at each moment of a training step, worked out before anything is queued."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from neuclip_scale.config import (
    ModelConfig,
    Recipe,
    check_recipe,
    local_batch_size,
    micro_batch_size,
    num_micro_batches,
)
from neuclip_scale.grad_cache import KeptActivations
from neuclip_scale.models.clip import Towers
from neuclip_scale.planning.gradients import gradient_items
from neuclip_scale.planning.kernels import by_triton, similarity_bytes
from neuclip_scale.planning.normalizers import largest_tile, normalizer_items
from neuclip_scale.planning.parts import MOMENTS, PASSES, MemoryItem, Moment
from neuclip_scale.planning.sharding import (
    BF16,
    FP32,
    ModelSizes,
    Sharding,
    model_sizes,
    planned,
    sharding_of,
)
from neuclip_scale.planning.tracing import EncoderTrace, Line, trace_encoders, trace_forward

GIB = 2**30
CUDA_CONTEXT = 6 * GIB // 10
"""Allowance: a CUDA context with torch's kernels and cuBLAS's and cuDNN's workspaces. Not measured."""
NCCL_BUFFERS = GIB
"""Allowance: NCCL's channels and its proxies on the device. Not measured."""
ALLOCATOR_SHARE = 0.05
"""Allowance: what the caching allocator holds beyond live tensors, as a share of them. Not measured."""
RANDOM_STATE = 5056
"""Bytes of the CPU generator's state, which the gradient cache keeps for each micro-batch."""


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

    def at(self, moment: Moment) -> int:
        """Bytes on the device at one moment of a step."""
        return sum(item.device for item in self.items if moment in item.moments)

    @property
    def moment(self) -> Moment:
        """When the most is held."""
        return max(MOMENTS, key=self.at)

    @property
    def device(self) -> int:
        """The most that lies on the device at once, allowances included."""
        return self.at(self.moment)

    @property
    def host(self) -> int:
        """Bytes of each rank in the host's memory, without the data loader's."""
        return sum(item.host for item in self.items)

    def document(self) -> dict[str, Any]:
        """Everything as plain values."""
        moments = {moment: self.at(moment) for moment in MOMENTS}
        return {**asdict(self), "device_bytes": self.device, "host_bytes": self.host, "bytes_at": moments}


def plan_memory(
    config: Recipe, world_size: int, dataset_size: int = 0, *, device: Literal["cuda", "cpu"] = "cuda"
) -> MemoryPlan:
    """Memory of each rank of `config` on `world_size` ranks; nothing is allocated. Raises `ConfigError`.

    `dataset_size` is n, for objectives that keep something for every pair. Parameters, gradients and optimizer state
    follow ZeRO's formula (arXiv 1910.02054) in fp32; activations are counted by running the model without memory
    (`tracing`). For a `device` of cuda stated allowances are added.
    """
    check_recipe(config, world_size)
    sizes, sharding = model_sizes(config), sharding_of(config, world_size)
    items = [
        *_state(config, sharding, sizes),
        *gradient_items(config, sharding, sizes, world_size),
        *_gathered(config, sharding, sizes, world_size),
        *_encoders(config, sharding, sizes, world_size),
        *_features(config, sizes.embed_dim, world_size, device),
        *normalizer_items(config, sizes.embed_dim, world_size, dataset_size, device),
    ]
    if device != "cpu":
        items += _allowances(items, world_size)
    items = [item for item in items if item.device or item.host]
    return MemoryPlan(sharding.label, world_size, sizes.total, sizes.trained, items)


def _allowances(items: list[MemoryItem], world_size: int) -> list[MemoryItem]:
    most = max(sum(item.device for item in items if moment in item.moments) for moment in MOMENTS)
    found = [
        MemoryItem("CUDA context", CUDA_CONTEXT, 0, "allowance: context, kernels, library workspaces"),
        MemoryItem("allocator", int(ALLOCATOR_SHARE * most), 0, f"allowance: {ALLOCATOR_SHARE:.0%} of the live bytes"),
    ]
    if world_size > 1:
        found.append(MemoryItem("communication buffers", NCCL_BUFFERS, 0, "allowance: NCCL's own"))
    return found


def _state(config: Recipe, sharding: Sharding, sizes: ModelSizes) -> list[MemoryItem]:
    def item(name: str, size: int, shards: int, on_host: bool, how: str) -> MemoryItem:
        part = math.ceil(size / shards)
        over = f", over {shards} ranks" if shards > 1 else ""
        return MemoryItem(name, 0 if on_host else part, part if on_host else 0, how + over)

    words = 2 + (1 if sharding.master else 0)
    found = [
        item("parameters", FP32 * sizes.total, sharding.parameters, sharding.parameters_on_host, "4 bytes each"),
        item(
            "optimizer",
            words * FP32 * sizes.trained,
            sharding.optimizer,
            sharding.optimizer_on_host,
            "AdamW's two moments" + (" and the master copy" if sharding.master else ""),
        ),
        MemoryItem("buffers", sizes.buffer_bytes, 0, "BatchNorm's running statistics"),
    ]
    if config.optim.ema_decay:
        size = FP32 * sizes.trained
        found.append(item("running average", size, sharding.parameters, sharding.parameters_on_host, "4 bytes each"))
    return found


def _gathered(config: Recipe, sharding: Sharding, sizes: ModelSizes, world_size: int) -> list[MemoryItem]:
    """Whole parameters for the time they are used."""
    if sharding.engine == "fsdp2":
        return _fsdp2_gathered(config, sizes)
    if sharding.parameters == 1:
        return []
    small = sum(size for size, _, _ in sizes.low if size <= sharding.persistent)
    large = sizes.total - small
    if num_micro_batches(config, world_size) > 1:
        most = min(large, max(size for size, _, _ in sizes.low) + sharding.prefetch)
        how, moments = "the largest, and those fetched ahead", PASSES
    else:
        most, how = min(large, sharding.reuse), "kept from forward to backward: stage3_max_reuse_distance"
        moments = MOMENTS[:-1]
    return [
        MemoryItem("small parameters", FP32 * small, 0, f"whole: at most {sharding.persistent:,} elements each"),
        MemoryItem("gathered parameters", FP32 * most, 0, how, moments),
    ]


def _fsdp2_gathered(config: Recipe, sizes: ModelSizes) -> list[MemoryItem]:
    root, block = FP32 * sizes.root, block_width(config) * sizes.largest_block
    if not config.engine.fsdp.reshard_after_forward:
        size = root + block_width(config) * (sizes.total - sizes.root)
        return [MemoryItem("gathered parameters", size, 0, "all, kept from forward to backward", MOMENTS[:4])]
    # A group is gathered into one buffer and copied out of it; the next block is on its way meanwhile.
    how = "embeddings and projections; of blocks one in use and two buffers"
    return [MemoryItem("gathered parameters", root + 3 * block, 0, how, PASSES)]


def block_width(config: Recipe) -> int:
    """Bytes of an element of the blocks' parameters where FSDP2 has gathered them."""
    return BF16 if config.train.precision == "bf16" else FP32


def _encoders(config: Recipe, sharding: Sharding, sizes: ModelSizes, world_size: int) -> list[MemoryItem]:
    pairs, local = micro_batch_size(config, world_size), local_batch_size(config, world_size)
    trace = encoder_trace(config.model, config.train.precision, sharding.engine == "fsdp2")
    edge, length = sizes.image_size, sizes.context_length
    batch = local * (FP32 * 3 * edge**2 + 8 * length + 8)
    found = [MemoryItem("pictures and tokens", batch, 0, f"{local} pairs, {edge} pixels, fp32")]
    per_pair = int(trace.forward.slope[-1])
    how = f"{pairs} pairs of {per_pair / 2**20:.1f} MiB in {config.train.precision}"
    encoding, kept, first = _first_encoding(config, sharding.engine == "fsdp2", world_size)
    found += [
        MemoryItem("encoding", encoding, 0, f"{pairs} pairs at a time", ("encode",)),
        MemoryItem("kept activations", kept, 0, how, ("normalizers", "similarities")),
        MemoryItem("activations of others", kept - first, 0, "kept for later micro-batches", ("backward",)),
    ]
    gone = num_micro_batches(config, world_size) == 1 == world_size and sharding.engine == "ddp"
    size = (trace.training + trace.gradients if gone else trace.training).peak(pairs)
    if sharding.engine == "fsdp2" and config.engine.fsdp.reshard_after_forward:
        # Gathering embeddings and projections again takes them twice for a moment, before anything is let go.
        again = FP32 * sizes.root - 3 * block_width(config) * sizes.largest_block
        size = max(size, trace.forward.last(pairs) + again)
    found.append(MemoryItem("activations", size, 0, how + " and their gradients", ("backward",)))
    return found


@lru_cache(maxsize=32)
def encoder_trace(section: ModelConfig, precision: str, low_blocks: bool) -> EncoderTrace:
    """`trace_encoders` of a recipe's model, once for each."""
    return trace_encoders(planned(section, False), precision, blocks_in_low_precision=low_blocks)


@lru_cache(maxsize=32)
def forward_trace(section: ModelConfig, precision: str, low_blocks: bool, towers: Towers, with_graph: bool) -> Line:
    """`trace_forward` of a recipe's model, once for each."""
    model = planned(section, False)
    return trace_forward(model, precision, towers, with_graph=with_graph, blocks_in_low_precision=low_blocks)


def _first_encoding(config: Recipe, low_blocks: bool, world_size: int) -> tuple[int, int, int]:
    """The most held in it, what of it is kept, and what of that belongs to the first micro-batch."""
    pairs, several = micro_batch_size(config, world_size), num_micro_batches(config, world_size)
    keep = KeptActivations.of(config.train, several)
    most = held = first = 0
    for number in range(several):
        for towers, keeps in keep.passes(number):
            line = forward_trace(config.model, config.train.precision, low_blocks, towers, keeps)
            most = max(most, held + line.peak(pairs))
            held += line.last(pairs) if keeps else 0
        first = first or held
    return most, held, first


def _features(config: Recipe, d: int, world_size: int, device: str) -> list[MemoryItem]:
    b, B = local_batch_size(config, world_size), config.train.global_batch_size
    num_micro = num_micro_batches(config, world_size)
    after: tuple[Moment, ...] = tuple(moment for moment in MOMENTS if moment not in ("encode", "normalizers"))
    states = RANDOM_STATE * num_micro if num_micro > 1 else 0
    how = f"[{b}, {d}] features, two sides" + (f"; {num_micro} random states" if states else "")
    found = [
        MemoryItem("gradient cache", FP32 * 2 * b * d, states, how),
        MemoryItem("feature gradients", FP32 * 2 * b * d, 0, f"[{b}, {d}], two sides", after),
        _similarities(config, b, d, device),
    ]
    if world_size > 1 and config.objective.exchange == "ring":
        size = FP32 * 2 * b * d
        how = f"two blocks of [{b}, {d}] on their way and a block's gradients, two sides"
        found.insert(1, MemoryItem("travelling features", 3 * size, 0, how, ("similarities",)))
    elif world_size > 1:
        how = f"[{B}, {d}], two sides"
        found.insert(1, MemoryItem("gathered features", FP32 * 2 * B * d, 0, how, MOMENTS[num_micro == 1 :]))
        if num_micro > 1:
            size = FP32 * 2 * world_size * micro_batch_size(config, world_size) * d
            found.insert(2, MemoryItem("arriving features", size, 0, "a micro-batch's, of all ranks", ("encode",)))
    return found


def _similarities(config: Recipe, b: int, d: int, device: str) -> MemoryItem:
    """Triton adds to the gradients in place; torch makes those of a tile's rows first."""
    wide = b if config.objective.exchange == "ring" else config.train.global_batch_size
    if by_triton(d, device):
        rounded, weights = similarity_bytes(config, b, wide, d)
        blocks = FP32 * 2 * b * d if config.objective.exchange == "ring" else 0
        how = "a chunk of weights" + (", features rounded to bf16" if rounded else "")
        return MemoryItem("similarity chunk", rounded + weights + blocks, 0, how, ("similarities",))
    edge = largest_tile(config, device)
    tile, wide = min(edge, b), min(edge, wide)
    size = FP32 * (2 * tile * wide + tile * d + 3 * b * d)
    how = f"two of [{tile}, {wide}] at a time, and the rows' gradients before they are joined"
    return MemoryItem("similarity tiles", size, 0, how, ("similarities",))
