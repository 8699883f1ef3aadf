"""A training step that has been launched: what is kept of it until the host reads its numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.cost import PackedTokens
from neuclip_scale.data.digest import batch_digest
from neuclip_scale.data.loader import LoadedBatch
from neuclip_scale.objectives import ObjectiveOutput
from neuclip_scale.sections import StepTimer, section
from neuclip_scale.similarity import PairFeatures
from neuclip_scale.transfers import HostCopy, to_device


@dataclass(frozen=True)
class StepResult:
    """What one training step computed on this rank, without a graph."""

    pairs: PairFeatures
    output: ObjectiveOutput
    logit_scale: Tensor  # [1], before the update
    grad_norm: Tensor  # []
    captions: PackedTokens | None
    """None where they were not packed."""


@dataclass(frozen=True)
class StepNumbers:
    """What the host reads of a step, of all ranks and equal on all."""

    metrics: dict[str, Any]
    captions: PackedTokens | None
    stopping: bool
    """Whether any rank was asked to stop."""
    saved: bool
    """Whether all ranks have written the checkpoint that is being saved."""
    num_read: int
    num_skipped: int
    positions: list[int]
    """Of all streams."""
    arrival: float
    """When the host had them, by `time.perf_counter`."""


class QueuedNumbers:
    """A step's numbers on their way from all ranks to the host.

    One reduction and one copy for everything that is added up: each `.item()` would be a wait for the GPU.
    """

    @section("reduce")
    def __init__(
        self, result: StepResult, loaded: LoadedBatch, *, stop: bool = False, save_is_written: bool = False
    ) -> None:
        """Queue them behind the step (collective); `stop` and `save_is_written` are what this rank says."""
        loss, metrics, world_size = result.output.loss, result.output.metrics, distributed.world_size()
        values = [loss, *(value / world_size for value in metrics.values())]
        counts = [stop, save_is_written, loaded.num_read, len(loaded.skipped)]
        tokens = [mean / world_size for part in result.captions or () for mean in part]
        flags = to_device(torch.tensor([*counts, *tokens], dtype=loss.dtype), loss.device)
        packed = torch.cat([torch.stack([value.reshape(()) for value in values]), flags])
        local = torch.stack([result.logit_scale.reshape(()), result.grad_norm.reshape(()).to(packed)])
        numbers = torch.cat([distributed.all_reduce_sum(packed), local])
        marks = distributed.all_gather_rows(to_device(loaded.stream_marks, loss.device))
        self._names = list(metrics)
        self._copy = HostCopy(numbers, marks)

    def read(self) -> StepNumbers:
        """Wait for this step, not for what was queued after it."""
        numbers, marks = (tensor.tolist() for tensor in self._copy.wait())
        loss, *means = numbers[: 1 + len(self._names)]
        stopping, num_written, num_read, num_skipped, *tokens, scale, grad_norm = numbers[1 + len(self._names) :]
        digests, contents, positions = zip(*marks, strict=True)
        return StepNumbers(
            {"loss": loss, "logit_scale": scale, "grad_norm": grad_norm}
            | dict(zip(self._names, means, strict=True))
            | {"batch_digest": batch_digest(digests), "content_digest": batch_digest(contents)},
            captions=PackedTokens.of_means(tokens) if tokens else None,
            stopping=stopping > 0,
            saved=num_written == distributed.world_size(),
            num_read=int(num_read),
            num_skipped=int(num_skipped),
            positions=list(positions),
            arrival=self._copy.arrival,
        )


@dataclass(frozen=True)
class LaunchedStep:
    """Everything that is recorded of a step; neither its graph nor its batch on the device."""

    number: int
    """The first is 1."""
    numbers: QueuedNumbers
    loaded: LoadedBatch
    features: tuple[Tensor, Tensor]  # pictures' and captions', [b, d]
    timer: StepTimer
    data_time: float
    learning_rate: float
    objective_flops: int
    measured: dict[str, Any]
    """Of the normalizer monitor."""


class StepClock:
    """Seconds of each step, from when the host had the numbers of the one before to when it had its own.

    So they add up to the time of the loop, whichever steps were launched in between.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def step(self, arrival: float) -> float:
        """Seconds of the step whose numbers came at `arrival`."""
        seconds, self._since = arrival - self._since, arrival
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside, while no step is under way, counts in none."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
