"""Memory of the objective's state, and of the work on it in a step."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from neuclip_scale.config import ObjectiveConfig, Recipe, local_batch_size
from neuclip_scale.normalizers import DatasetFeatures
from neuclip_scale.objectives import Objective, create_objective
from neuclip_scale.objectives.neuclip_queue import NeuCLIPQueue
from neuclip_scale.objectives.registry import Problem
from neuclip_scale.planning.kernels import by_triton, npn_bytes, queue_copy_bytes, queue_sums_bytes, similarity_bytes
from neuclip_scale.planning.parts import MemoryItem
from neuclip_scale.planning.sharding import model_sizes
from neuclip_scale.similarity.tiled import LARGEST_TILE_ON_CPU

FP32, BF16 = 4, 2
WORKSPACE, ALL_FEATURES = "estimate of the normalizers", "features of all pairs"
# Attribute of the objective: what it is called in a plan.
NAMES = {
    "image_npn": "NPN and its optimizer",
    "text_npn": "NPN and its optimizer",
    "recent": "recent pairs",
    "table": "u table",
    "temperatures": "temperatures",
    "queue": "queue",
    "networks": "normalizer networks",
    "horizon": "queue",
}


def planned_objective(config: Recipe, embed_dim: int, dataset_size: int) -> Objective:
    """The recipe's objective on the meta device, not to be changed; tables and queues as on a single rank."""
    train, seen = config.train, config.train.num_steps * config.train.global_batch_size
    problem = Problem(
        embed_dim=embed_dim,
        dataset_size=dataset_size or None,
        num_epochs=(seen / dataset_size if train.num_steps else train.epochs) if dataset_size else None,
        global_batch_size=train.global_batch_size,
        projected_widths=model_sizes(config).projected_widths if config.objective.queue.project_anew else None,
        encode_dataset=_nobody,
    )
    return _planned(config.objective, problem)


@lru_cache(maxsize=32)
def _planned(section: ObjectiveConfig, problem: Problem) -> Objective:
    with torch.device("meta"):
        return create_objective(section, problem)


def _nobody() -> DatasetFeatures:
    raise AssertionError("a planned objective is not run")


def largest_tile(config: Recipe, device: str) -> int:
    """Edge of the tiles of similarities on a device."""
    return min(config.objective.tile_size, LARGEST_TILE_ON_CPU) if device == "cpu" else config.objective.tile_size


def normalizer_items(
    config: Recipe, embed_dim: int, world_size: int, dataset_size: int, device: str = "cuda"
) -> list[MemoryItem]:
    """State by kind, tables and queues over the ranks, and the estimate's own workspace."""
    objective = planned_objective(config, embed_dim, dataset_size)
    replicated = objective.state_dict().keys()  # what is sharded is not persistent
    sizes: dict[str, int] = {}
    for name, tensor in [*objective.named_buffers(), *objective.named_parameters()]:
        kind = NAMES.get(name.partition(".")[0], "normalizers")
        # An item of a network: itself, its average, the frozen copy are there already; Adam's two moments are not.
        words = 3 if name.startswith("networks.networks.") else 1
        size = words * tensor.nbytes
        sizes[kind] = sizes.get(kind, 0) + math.ceil(size / (1 if name in replicated else world_size))
    if isinstance(objective, NeuCLIPQueue):
        sizes["queue"] += FP32 * 2 * objective.queue.size * len(objective.horizon.horizons)  # weights of every age
        if _fused(objective, device):
            widths = sum(objective.queue.widths)
            sizes["queue"] += queue_copy_bytes(config, math.ceil(objective.queue.size / world_size), widths)
    over = f", over {world_size} ranks" if world_size > 1 else ""
    told = {"u table": over, "temperatures": over, "queue": over}
    items = [
        MemoryItem(kind, size, 0, f"state of {config.objective.name}{told.get(kind, '')}")
        for kind, size in sizes.items()
    ]
    if config.objective.name == "exact":
        size = FP32 * 2 * embed_dim * dataset_size
        items.append(MemoryItem(ALL_FEATURES, size, 0, f"[{dataset_size}, {embed_dim}], two sides"))
    workspace, how = _workspace(config, embed_dim, world_size, dataset_size, device)
    return [*items, MemoryItem(WORKSPACE, workspace, 0, how, ("normalizers",))]


def _workspace(config: Recipe, d: int, world_size: int, dataset_size: int, device: str) -> tuple[int, str]:
    """Bytes that the estimate needs while it is made, or the batch's own sums before it."""
    b = local_batch_size(config, world_size)
    return max(_sums(config, b, d, device), _estimate(config, b, d, world_size, dataset_size, device))


def _estimate(config: Recipe, b: int, d: int, world_size: int, dataset_size: int, device: str) -> tuple[int, str]:
    section, edge = config.objective, largest_tile(config, device)
    if section.name == "neuclip" and by_triton(d, device):
        return npn_bytes(config, section.npn, b, d), "both NPNs' updates, and a chunk of exponentials"
    if section.name == "neuclip":
        m, tile = section.npn.num_prototypes, min(edge, b)
        masks = b * m if section.npn.exclude_own else 0
        update = FP32 * (4 * m * d + tile * m + b * d + tile * d) + masks
        return update, f"an NPN's update: [{m}, {d}] four times, tiles of [{tile}, {m}]"
    if section.name == "neuclip-queue":
        objective = planned_objective(config, d, dataset_size)
        assert isinstance(objective, NeuCLIPQueue)
        sums = _queue_sums(config, objective, world_size, device)
        return max(sums, _new_entries(config, objective, d, world_size))
    if section.name == "exact":
        wide = min(edge, dataset_size)
        return FP32 * (3 * b * wide), f"[{b}, {wide}] three times"
    return 0, ""


def _queue_sums(config: Recipe, objective: NeuCLIPQueue, world_size: int, device: str) -> tuple[int, str]:
    """With `project_anew` beside all anchors, which went through the other side's last map."""
    queue, B = objective.queue, config.train.global_batch_size
    owned, edge, widest = math.ceil(queue.size / world_size), largest_tile(config, device), max(queue.widths)
    anchors, beside = (FP32 * B * sum(queue.widths), ", and mapped anchors") if objective.needs_projections else (0, "")
    if _fused(objective, device):
        sums = queue_sums_bytes(config, owned, len(objective.horizon.horizons), widest)
        return anchors + sums, f"a side's sums over {owned} entries of the queue{beside}"
    rows, wide = min(edge, B), min(edge, owned)
    tiles = FP32 * rows * (wide + sum(queue.widths)) + 2 * rows * wide  # anchors of both sides, and masks
    return anchors + tiles, f"tiles of [{rows}, {wide}]{beside}"


def _new_entries(config: Recipe, objective: NeuCLIPQueue, d: int, world_size: int) -> tuple[int, str]:
    """Of past pairs mapped anew: what the last maps are given for all ranks' pairs, and this rank's entries of them."""
    if not objective.needs_projections:
        return 0, ""
    B, width = config.train.global_batch_size, sum(objective.queue.widths)
    rows = math.ceil(B / world_size)
    entries = FP32 * rows * (2 * width + d)
    return entries + B * max(last_inputs(config)) * (world_size > 1), f"[{rows}, {width}] twice, and all pairs' inputs"


def _fused(objective: NeuCLIPQueue, device: str) -> bool:
    """Whether Triton sums over the queue."""
    return all(by_triton(width, device) for width in objective.queue.widths)


def last_inputs(config: Recipe) -> tuple[int, int]:
    """Bytes of what the last maps are given for one picture and for one caption; other libraries' towers may end in
    fp32 whatever the precision.
    """
    half = config.train.precision != "fp32"
    image, text = model_sizes(config).projected_widths
    return (
        (BF16 if half and not config.model.image_tower else FP32) * image,
        (BF16 if half and not config.model.text_tower else FP32) * text,
    )


def _sums(config: Recipe, b: int, d: int, device: str) -> tuple[int, str]:
    """Of the batch's own sums; through Triton, a number of each row and block of columns is far less than a tile."""
    ring, B = config.objective.exchange == "ring", config.train.global_batch_size
    if by_triton(d, device):
        return similarity_bytes(config, b, b if ring else B, d)[0], "the batch's sums, features rounded to bf16"
    edge = largest_tile(config, device)
    tile = min(edge, b)
    return FP32 * (2 * tile * min(edge, B) + tile * d), "the batch's sums, two tiles at a time"
