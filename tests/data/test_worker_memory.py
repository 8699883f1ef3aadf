"""The limit on a decoding process's memory, with processes that really grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import byte_tokenizer, make_loader, take

from neuclip_scale.config import DataConfig
from neuclip_scale.data.loader import TrainLoader
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.worker_memory import MemoryLimit, WorkerMemoryError

MEBIBYTE = 1 << 20


class Hoarder:
    """A picklable transform that keeps 8 MiB for every picture."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []

    def __call__(self, image: Any, generator: np.random.Generator) -> torch.Tensor:
        self.kept.append(np.ones(8 * MEBIBYTE, np.uint8))
        return torch.zeros(1)


def hoarding_loader(manifest: Manifest, limit_gib: float) -> TrainLoader:
    section = DataConfig(num_streams=4, num_workers=1, prefetch_batches=1, max_worker_memory_gib=limit_gib)
    return TrainLoader(
        manifest,
        section,
        global_batch_size=4,
        rank=0,
        world_size=1,
        seed=0,
        transform=Hoarder(),
        tokenizer=byte_tokenizer,
    )


def test_a_worker_that_grows_ends_the_run_and_is_named(clean_manifest: Manifest) -> None:
    with pytest.raises(WorkerMemoryError, match=r"worker process \d+ has come to hold 0\.\d+ GiB") as caught:
        take(hoarding_loader(clean_manifest, 0.1), 20)
    for part in ("data.max_worker_memory_gib = 0.1", "streams 0 to 3", "resumes from the newest checkpoint"):
        assert part in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(take(hoarding_loader(clean_manifest, 0.0), 6)) == 6


def test_caches_are_dropped_first() -> None:
    cache = []
    limit = MemoryLimit(0.1, cache.clear)
    limit.check("testing")
    cache.append(np.ones(200 * MEBIBYTE, np.uint8))
    limit.check("testing")
    assert not cache
    kept = np.ones(200 * MEBIBYTE, np.uint8)
    with pytest.raises(WorkerMemoryError, match="testing"):
        limit.check("testing")
    assert kept.all()


def test_dropping_the_caches_changes_no_batch(clean_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(make_loader(clean_manifest, num_workers=1), 6)
    monkeypatch.setattr(MemoryLimit, "check", lambda self, activity: self._drop_caches())
    for step, ref in zip(take(make_loader(clean_manifest, num_workers=1), 6), expected):
        assert torch.equal(step.batch.images, ref.batch.images)
        assert step.batch.uids == ref.batch.uids
