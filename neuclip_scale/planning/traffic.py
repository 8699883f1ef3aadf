"""What every rank sends in a training step, collective by collective: exact for gloo, and what NCCL must move too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from neuclip_scale.config import Recipe, num_micro_batches
from neuclip_scale.grad_cache import KeptActivations
from neuclip_scale.models.clip import Towers
from neuclip_scale.objectives.neuclip_queue import NeuCLIPQueue
from neuclip_scale.planning.normalizers import last_inputs, planned_objective
from neuclip_scale.planning.sharding import (
    BF16,
    FP32,
    ModelSizes,
    ParameterGroup,
    Sharding,
    model_sizes,
    sharding_of,
)

INT64, FP64 = 8, 8
DDP_BUCKET = 25 << 20
"""Bytes: DDP's default of bucket_cap_mb."""
Kind = Literal["all_gather", "all_reduce", "all_to_all", "reduce_scatter", "broadcast", "send"]
Group = Literal["all", "neighbours", "counterparts"]
"""All ranks; or, of FSDP2 with several replicas, those of one replica, or those that hold the same part of each."""


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step."""

    name: str
    kind: Kind
    payload: int
    """Bytes of the whole tensor, over all calls of a step: what an all-gather gives, what a reduction or an
    exchange takes, what a rank sends to its neighbour."""
    ranks: int
    """Ranks of the group that it runs over."""
    exposed: bool
    """Whether computation waits for it; the others run beside the encoders."""
    group: Group = "all"
    """Which ranks run it together."""
    calls: int = 1
    """How often in a step; an estimate where the library decides (DDP's and ZeRO's buckets)."""

    @property
    def sent(self) -> int:
        """Bytes that each rank sends, by the ring's count: W - 1 of W parts, twice in an all-reduce."""
        if self.kind in ("broadcast", "send"):
            return self.payload
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.payload * (self.ranks - 1) // self.ranks


def plan_traffic(config: Recipe, world_size: int, dataset_size: int = 0) -> list[Transfer]:
    """Collectives of one step on `world_size` ranks; none for a single one. Those that are waited for are in the order
    in which they are started.

    Of a step in the middle of a run: DDP's first steps, restarts and checkpoints send other things besides.
    """
    if world_size == 1:
        return []
    sizes, sharding = model_sizes(config), sharding_of(config, world_size)
    engine = {"ddp": _ddp, "fsdp2": _fsdp2, "deepspeed": _deepspeed}[sharding.engine]
    found = [
        *_features(config, sizes.embed_dim, world_size),
        *_objective(config, sizes.embed_dim, world_size, dataset_size),
        *engine(config, sizes, sharding, world_size),
        *_numbers(config, world_size),
    ]
    return [transfer for transfer in found if transfer.payload]


def _features(config: Recipe, d: int, world_size: int) -> Iterator[Transfer]:
    B, several = config.train.global_batch_size, num_micro_batches(config, world_size)
    if config.objective.exchange == "ring":
        yield from _ring(config, d, world_size)
    else:
        # Those of a micro-batch travel while the next is encoded.
        early = (several - 1) * config.train.micro_batch_size * world_size
        yield Transfer(
            "features, early", "all_gather", FP32 * 2 * early * d, world_size, False, calls=2 * (several - 1)
        )
        yield Transfer("features", "all_gather", FP32 * 2 * (B - early) * d, world_size, True, calls=2)
    yield Transfer("sample indices", "all_gather", INT64 * B, world_size, True)


def _ring(config: Recipe, d: int, world_size: int) -> Iterator[Transfer]:
    """Blocks of features on their way around the ranks, once for statistics and once for gradients.

    Told as waited for, though a block travels while the one before it is multiplied: an upper bound.
    """
    B, name = config.train.global_batch_size, config.objective.name
    hops = (1 if name == "siglip" else 2) * (world_size - 1)
    size = FP32 * 2 * (B // world_size) * d
    yield Transfer("features, around the ring", "send", hops * size, world_size, True, calls=hops)
    if name not in ("siglip", "openclip", "amorlip"):
        yield Transfer("positives", "all_gather", FP32 * B, world_size, True)
    if name == "neuclip":
        recent = FP32 * 2 * min(config.objective.npn.num_prototypes, B) * d
        yield Transfer("recent pairs", "all_reduce", recent, world_size, True, calls=2)


def _objective(config: Recipe, d: int, world_size: int, dataset_size: int) -> Iterator[Transfer]:
    section, B = config.objective, config.train.global_batch_size
    name = section.name
    rows = FP32 * 2 * B
    if name.startswith(("fastclip", "sogclr", "isogclr")):
        yield Transfer("u table", "all_reduce", rows, world_size, True)
    if name == "neuclip":
        npn = section.npn
        calls = 2 * npn.updates_per_step
        size = FP32 * calls * npn.num_prototypes * d
        yield Transfer("NPN gradients", "all_reduce", size, world_size, True, calls=calls)
    if name == "amorlip":
        objective = planned_objective(config, d, dataset_size)
        size = sum(p.nbytes for n, p in objective.named_parameters() if n.startswith("networks.networks."))
        calls = section.amortized.updates_per_step
        yield Transfer("networks' gradients", "all_reduce", calls * size, world_size, True, calls=calls)
    if name == "neuclip-queue":
        objective = planned_objective(config, d, dataset_size)
        assert isinstance(objective, NeuCLIPQueue)
        horizons = len(objective.horizon.horizons)
        # Each rank sums for all B anchors, and sends each rank the sums of its own.
        size = FP32 * B * 3 * horizons
        yield Transfer("queue's sums", "all_to_all", size, world_size, True)
        yield Transfer("horizons' gradient", "all_reduce", FP32 * (2 * horizons + 1), world_size, True)
        if section.queue.project_anew:
            yield Transfer("last maps' inputs", "all_gather", B * sum(last_inputs(config)), world_size, True, calls=2)
    if name != "siglip":
        yield Transfer("log-normalizers", "all_gather", rows, world_size, True)
    if name in ("fastclip-v2", "isogclr"):
        yield Transfer("temperatures", "all_reduce", rows, world_size, True)
        yield Transfer("temperatures' gradients", "all_gather", rows, world_size, True)


def _numbers(config: Recipe, world_size: int) -> Iterator[Transfer]:
    """The trainer's: loss, the objective's means, four counts, four means of packed captions' tokens; stream marks."""
    means = {"openclip": 1, "siglip": 1, "rgcl-g": 2, "exact": 2, "neuclip": 2, "amorlip": 3, "neuclip-queue": 3}
    means |= {"fastclip-v2": 4, "isogclr": 4}
    packs = config.model.pack_captions and not config.model.text_tower
    size = FP32 * (1 + means.get(config.objective.name, 3) + 4 + 4 * packs)
    yield Transfer("the step's numbers", "all_reduce", size, world_size, True)
    yield Transfer("stream marks", "all_gather", 3 * INT64 * config.data.num_streams, world_size, True)


def _ddp(config: Recipe, sizes: ModelSizes, sharding: Sharding, world_size: int) -> Iterator[Transfer]:
    buckets = math.ceil(FP32 * sizes.trained / DDP_BUCKET)
    yield Transfer("gradients", "all_reduce", FP32 * sizes.trained, world_size, False, calls=buckets)
    yield Transfer("BatchNorm's buffers", "broadcast", sizes.buffer_bytes, world_size, True)


def _fsdp2(config: Recipe, sizes: ModelSizes, sharding: Sharding, world_size: int) -> Iterator[Transfer]:
    section, shards, num_micro = config.engine.fsdp, sharding.parameters, num_micro_batches(config, world_size)
    mine: Group = "neighbours" if sharding.replicas > 1 else "all"
    low = BF16 if config.train.precision == "bf16" else FP32
    events = list(_passes(KeptActivations.of(config.train, num_micro), num_micro))
    forward = backward = forward_calls = backward_calls = 0
    for group, needed, hooked in _in_backward(sizes):
        size = group.padded(shards) * (low if group.is_block else FP32)
        before, again = _gatherings(events, group.tower, needed, hooked, stays=not section.reshard_after_forward)
        forward, forward_calls = forward + before * size, forward_calls + before
        backward, backward_calls = backward + again * size, backward_calls + again
    yield Transfer("parameters, forward", "all_gather", forward, shards, False, mine, forward_calls)
    yield Transfer("parameters, backward", "all_gather", backward, shards, False, mine, backward_calls)
    times = num_micro if sharding.reduces_often else 1
    trained = [group for group in sizes.groups if group.is_trained]
    size = times * FP32 * sum(group.padded(shards, trained_only=True) for group in trained)
    yield Transfer("gradients", "reduce_scatter", size, shards, False, mine, times * len(trained))
    if sharding.replicas > 1:
        yield Transfer(
            "gradients, replicas",
            "all_reduce",
            size // shards,
            sharding.replicas,
            False,
            "counterparts",
            calls=times * len(trained),
        )
    yield Transfer("gradient norms", "all_reduce", FP32 * sizes.num_trained, shards, True, mine)


def _passes(keep: KeptActivations, num_micro: int) -> Iterator[Towers | None]:
    """The forward passes of a step, and None for every backward pass."""
    for number in range(num_micro):
        yield from (towers for towers, _ in keep.passes(number))
    for number in range(num_micro):
        yield from (towers for towers, keeps in keep.passes(number) if not keeps)
        yield None


def _gatherings(
    events: Sequence[Towers | None], tower: str, needed: bool, hooked: bool, *, stays: bool
) -> tuple[int, int]:
    """How often a step gathers a group of FSDP2 in forward and in backward passes; `stays` until the last of these."""
    forward = backward = 0
    there = False
    for place, towers in enumerate(events):
        if towers is None:
            fetched = needed and not there
            backward += fetched
            # What is fetched for nothing stays until its next forward pass.
            there = (stays and place < len(events) - 1 and (there or fetched)) or (fetched and not hooked)
        elif not tower or towers in ("both", tower):
            forward += not there
            there = stays
    return forward, backward


def _in_backward(sizes: ModelSizes) -> Iterator[tuple[ParameterGroup, bool, bool]]:
    """Each group, whether it is gathered in the backward pass, and whether gradients flow through it.

    The backward pass meets the groups in reverse order, the root first, and each fetches the one after it ahead: in a
    locked tower one block is gathered for nothing.
    """
    reached = [*(group.is_reached for group in sizes.groups[1:]), False]
    for group, ahead in zip(sizes.groups, reached, strict=True):
        yield group, group.is_reached or ahead, group.is_reached


def _deepspeed(config: Recipe, sizes: ModelSizes, sharding: Sharding, world_size: int) -> Iterator[Transfer]:
    num_micro = num_micro_batches(config, world_size)
    if sharding.stage == 3:
        yield from _zero3(config, sizes, sharding, world_size, num_micro)
        return
    width = [BF16 if config.train.precision == "bf16" and low and sharding.stage else FP32 for _, _, low in sizes.low]
    gradients = sum(w * size for w, (size, trained, _) in zip(width, sizes.low, strict=True) if trained)
    times = num_micro if sharding.reduces_often else 1
    calls = times * math.ceil(sizes.trained / (sharding.bucket or sizes.trained))
    yield Transfer("gradients", "all_reduce", times * gradients, world_size, False, calls=calls)
    if sharding.stage:
        groups = sizes.optimizer_groups
        aligned = 2 * world_size  # of each flattened group
        size = FP32 * sum(math.ceil(group / aligned) * aligned for group in groups)
        yield Transfer("norms", "all_reduce", FP32 * len(groups), world_size, True, calls=len(groups))
        yield Transfer("parameters, updated", "all_gather", size, world_size, True, calls=len(groups))
        yield Transfer("temperature", "all_reduce", FP32, world_size, True)


def _zero3(
    config: Recipe, sizes: ModelSizes, sharding: Sharding, world_size: int, num_micro: int
) -> Iterator[Transfer]:
    low_precision = config.train.precision == "bf16"

    def padded(size: int) -> int:
        return math.ceil(size / world_size) * world_size

    def width(low: bool) -> int:
        return BF16 if low_precision and low else FP32

    large = [padded(size) * width(low) for size, _, low in sizes.low if size > sharding.persistent]
    small = [FP32 * padded(size) for size, _, _ in sizes.low if size <= sharding.persistent]
    # In one pass of each kind DeepSpeed knows what comes next, and keeps what is used again soon. In several it fetches
    # the first parameter and then as much at once as it may ahead, and in the backward pass one after the other.
    fetches = 1 + math.ceil(sizes.total / (sharding.prefetch or sizes.total))
    singly = len(large) if num_micro > 1 else fetches
    if num_micro > 1:
        # At most, with one tower's activations kept.
        passes, back = 2 * num_micro - config.train.kept_micro_batches, num_micro
    else:
        passes, back = 1, 0 if sizes.total <= sharding.reuse else 1
    gradients = num_micro * sum(padded(size) * width(low) for size, trained, low in sizes.low if trained)
    calls = num_micro * math.ceil(sizes.trained / sharding.bucket)
    yield Transfer("parameters, forward", "all_gather", passes * sum(large), world_size, False, calls=passes * fetches)
    yield Transfer("parameters, backward", "all_gather", back * sum(large), world_size, False, calls=back * singly)
    yield Transfer("gradients", "reduce_scatter", gradients, world_size, False, calls=calls)
    yield Transfer("norms", "all_reduce", 3 * FP64, world_size, True, calls=3)
    yield Transfer("parameters, small", "all_gather", sum(small), world_size, True, calls=len(small))
    yield Transfer("temperature", "all_gather", FP32 * padded(1), world_size, True)
