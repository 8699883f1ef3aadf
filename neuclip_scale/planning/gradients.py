"""Gradients between the backward pass and the update, and the buffers in which they travel."""

from __future__ import annotations

import math

from neuclip_scale.config import Recipe, num_micro_batches
from neuclip_scale.planning.parts import LATE, MOMENTS, MemoryItem, Moment
from neuclip_scale.planning.sharding import BF16, FP32, ModelSizes, Sharding


def gradient_items(config: Recipe, sharding: Sharding, sizes: ModelSizes, world_size: int) -> list[MemoryItem]:
    """What an engine holds of gradients, fp32. The last backward pass of a step begins with those of earlier ones."""
    several = num_micro_batches(config, world_size) > 1
    if sharding.engine == "fsdp2":
        return _fsdp2(config, sharding, sizes, several)
    if sharding.stage:
        return _zero(config, sharding, sizes, several)
    whole = FP32 * sizes.trained
    if sharding.engine == "ddp" and world_size > 1:
        found = [MemoryItem("gradients", whole, 0, "4 bytes each, in DDP's buckets, which stay")]
        if several:
            found.append(MemoryItem("gradients of a micro-batch", whole, 0, "before they are added", ("backward",)))
        return found
    found = [MemoryItem("gradients", whole, 0, "4 bytes each", ("backward", *LATE) if several else LATE)]
    if sharding.engine == "deepspeed":
        found.append(MemoryItem("reduction buffers", whole, 0, "ZeRO 0 flattens them all", ("reduction",)))
    return found


def _fsdp2(config: Recipe, sharding: Sharding, sizes: ModelSizes, several: bool) -> list[MemoryItem]:
    shards, root, on_host = sharding.parameters, FP32 * sizes.root, sharding.optimizer_on_host
    own = math.ceil(FP32 * sizes.trained / shards)
    accumulated = several and config.engine.fsdp.accumulate_sharded
    moments = ("backward", *LATE) if accumulated else LATE
    how = f"4 bytes each, over {shards} ranks"
    blocks = FP32 * 2 * sizes.largest_block
    # A reduction's buffer stays until the next one begins: over a micro-batch that is the embeddings'.
    on_their_way = blocks + root if accumulated else blocks
    found = [
        MemoryItem("gradients", 0 if on_host else own, own if on_host else 0, how, moments),
        MemoryItem("reduction buffers", on_their_way, 0, "gradients on their way", ("backward",)),
        MemoryItem("last reduction", 2 * root, 0, "of embeddings and projections, and their buffer", ("reduction",)),
    ]
    if several and not accumulated:
        how = "4 bytes each until the last micro-batch"
        found.append(MemoryItem("whole gradients", FP32 * sizes.trained, 0, how, ("backward",)))
    return found


def _zero(config: Recipe, sharding: Sharding, sizes: ModelSizes, several: bool) -> list[MemoryItem]:
    """As DeepSpeed 0.19 was seen to do: buffers of the whole reduce_bucket_size, whatever the model's."""
    low, on_host = config.train.precision == "bf16", sharding.optimizer_on_host
    own = math.ceil(FP32 * sizes.trained / sharding.optimizer)

    def item(name: str, size: int, how: str, moments: tuple[Moment, ...]) -> MemoryItem:
        return MemoryItem(name, 0 if on_host else size, size if on_host else 0, how, moments)

    over = f"4 bytes each, over {sharding.optimizer} ranks"
    if sharding.stage == 3:
        buffers = sharding.bucket * (FP32 + (BF16 if low else 0))
        last = FP32 * (max(size for size, _, _ in sizes.low) + (2 if several else 1) * sizes.trained)
        return [
            item("gradients", own, over, MOMENTS),
            MemoryItem("reduction buffers", buffers, 0, "ZeRO's reduce_bucket_size, always there"),
            MemoryItem("last reduction", last, 0, "gradients and their copies", ("reduction",)),
            item("gradients of the update", own, over, ("update",)),
        ]
    buffers = FP32 * sharding.bucket * sharding.num_buckets * (2 if low else 1)
    how = f"ZeRO's reduce_bucket_size, {sharding.num_buckets * (2 if low else 1)} times"
    kept = FP32 * sizes.trained if sharding.stage == 1 else 2 * own
    found = [
        MemoryItem("reduction buffers", buffers, 0, how, ("backward", "reduction")),
        item("last gradients", kept if sharding.stage == 2 else 2 * kept, "and their copy", ("reduction",)),
        item("gradients", own, over, ("update",)),
        item("gradients of the update", 2 * own, "flattened, and in the optimizer's order", ("update",)),
    ]
    if several:
        found.append(item("summed gradients", kept, "of the micro-batches until now", ("backward",)))
    return found
