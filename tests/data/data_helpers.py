"""Small real shards, and pieces of a loader that test processes can pickle."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from neuclip_scale.config import DataConfig
from neuclip_scale.data.loader import LoadedBatch, TrainLoader
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.transforms import TrainTransform

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def byte_tokenizer(captions: list[str]) -> torch.Tensor:
    rows = [list(caption.encode()[:16].ljust(16, b"\0")) for caption in captions]
    return torch.tensor(rows)


def make_loader(manifest: Manifest, *, rank: int = 0, world_size: int = 1, **options: Any) -> TrainLoader:
    """A loader of global batch 12 over 4 streams; `options` are fields of DataConfig."""
    settings: dict[str, Any] = {"num_streams": 4, "shuffle_window": 7, "num_workers": 0, **options}
    batch = settings.pop("global_batch_size", 12)
    return TrainLoader(
        manifest,
        DataConfig(**settings),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        seed=settings.get("seed", 5),
        transform=TrainTransform(16, MEAN, STD, crop_scale=(0.4, 1.0)),
        tokenizer=byte_tokenizer,
    )


def take(loader: TrainLoader, steps: int) -> list[LoadedBatch]:
    iterator = iter(loader)
    loaded = list(islice(iterator, steps))
    iterator.close()  # type: ignore[attr-defined]  # ends the workers now
    return loaded
