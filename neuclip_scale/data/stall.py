"""Who waits for which shard, when data do not come."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from neuclip_scale.data.manifest import Manifest

logger = logging.getLogger(__name__)


class DataStall(RuntimeError):  # noqa: N818 - says what is wrong
    """No data came for `data.stall_timeout_seconds`; the run can be resumed."""


class StallWatch:
    """A thread that tells when the training process has waited long for one of its workers."""

    def __init__(self, manifest: Manifest, rank: int, num_workers: int, warn_after: float) -> None:
        self._manifest, self._rank, self._num_workers, self._warn_after = manifest, rank, num_workers, warn_after
        self.reading: Tensor = torch.full((max(1, num_workers),), -1, dtype=torch.int64).share_memory_()
        """Row in the manifest of the shard that each worker reads; the workers write it."""
        self._wait: tuple[float, int] | None = None
        self._wake = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch inside this block."""
        self._wake.clear()
        thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._wake.set()
            thread.join()

    @contextmanager
    def waiting(self, worker: int) -> Iterator[None]:
        """The training process waits for `worker` inside this block."""
        self._wait = time.monotonic(), worker
        try:
            yield
        finally:
            self._wait = None

    def describe(self, worker: int, seconds: float) -> str:
        """One line that names the rank, the worker, the shard it reads, and those of the others."""
        shards = [self._shard(number) for number in range(len(self.reading))]
        others = [f"{number}: {shard}" for number, shard in enumerate(shards) if number != worker]
        who = f"worker {worker}" if self._num_workers else "the training process itself"
        told = f"rank {self._rank} has waited {seconds:.0f} s for data: {who} reads {shards[worker]}"
        return f"{told} (the other workers: {', '.join(others)})" if others else told

    def _shard(self, worker: int) -> str:
        row = int(self.reading[worker])
        return "no shard yet" if row < 0 else self._manifest.shards[row].path

    def _watch(self) -> None:
        told: tuple[float, float] = (0.0, 0.0)  # when the wait began, and how long it was when it was told last
        while not self._wake.wait(min(5.0, self._warn_after / 2)):
            wait = self._wait
            if wait is None:
                continue
            began, worker = wait
            seconds = time.monotonic() - began
            last = told[1] if told[0] == began else 0.0
            if seconds >= max(self._warn_after, 2 * last):  # then after twice the time
                told = began, seconds
                logger.warning("%s", self.describe(worker, seconds))
