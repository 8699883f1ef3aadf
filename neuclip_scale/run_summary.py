"""What summary.json holds: how a run ended, what it read, and what it has cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neuclip_scale.config import Recipe
from neuclip_scale.data.mixing import MixedOrder
from neuclip_scale.data.shards import split_sources

if TYPE_CHECKING:
    from neuclip_scale.data.manifest import Manifest
    from neuclip_scale.data.streams import StreamOrder
    from neuclip_scale.run_state import RunState


def run_summary(
    config: Recipe, state: RunState, manifest: Manifest, order: StreamOrder | MixedOrder, cost: dict[str, Any]
) -> dict[str, Any]:
    """Facts of the run as it stands after `state.step` steps; the trainer adds what it alone knows."""
    samples = state.step * config.train.global_batch_size
    return {
        "recipe": config.name,
        "objective": config.objective.name,
        "seed": config.seed,
        "step": state.step,
        "samples_seen": samples,
        "dataset_size": manifest.num_samples,
        "epochs": samples / manifest.num_samples,
        "train_seconds": cost["train_seconds"],
        "device_hours": cost["device_hours"],
        "samples_per_second": samples / cost["train_seconds"] if cost["train_seconds"] else 0.0,
        "samples_read": state.num_read,
        "samples_skipped": state.num_skipped,
        "stream_positions": state.stream_positions,
        "epochs_checked": state.epochs_checked,
        "epochs_wrong": state.epochs_wrong,
        "sources": _sources(config.data.train, order, state.stream_positions),
        "faulty_shards": len(manifest.faulty_shards),
        "cost": cost,
    }


def _sources(train: str, order: StreamOrder | MixedOrder, positions: Sequence[int]) -> list[dict[str, Any]]:
    """What was read of each source that has a weight."""
    if not isinstance(order, MixedOrder) or not positions:
        return []
    parts, read = split_sources(train), order.read_of_each(positions)
    return [
        {"source": part, "samples": samples, "samples_read": count, "epochs": count / samples}
        for part, samples, count in zip(parts, order.samples_of_each, read, strict=True)
    ]
