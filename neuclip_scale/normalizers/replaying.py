"""Many small kernels of a step, started as a few CUDA graphs: with few pairs a GPU would else wait for the host."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_RECORDINGS = 4
"""Of one `Replays`: each holds the memory that its kernels write to."""

Inputs = Sequence[Tensor | None]
Work = Callable[..., Iterator[Tensor]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recording:
    """Graphs of the parts of some work, where they read the inputs, and what each part makes."""

    inputs: Inputs
    parts: list[tuple[Callable[[], None], Tensor]]


class Replays:
    """Runs generators of tensors whose kernels are the same in every step but for the numbers in their inputs.

    What lies between two tensors is a part, which must not wait for the GPU. On a GPU the second call of a kind records
    each part as a graph, and later ones copy their inputs to where the recorded kernels read them and start the graphs.
    A first call runs as it is: it compiles kernels, and a batch that comes once, such as an evaluation's last, is not
    worth a graph. On a CPU every call runs as it is.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self._recordings: dict[Hashable, _Recording | None] = {}

    def __reduce__(self) -> tuple[type[Replays], tuple[bool]]:
        """A copy begins without recordings, which read and write the original's tensors."""
        return type(self), (self.enabled,)

    @torch.no_grad()
    def run(self, work: Work, inputs: Inputs, kind: tuple[Hashable, ...], num_parts: int = 1) -> Iterator[Tensor]:
        """Yield what each of the `num_parts` parts of `work(*inputs)` makes; use it before the next call.

        `kind` begins with the work's name. Work of the same kind, on inputs of the same shapes, does the same, and all
        other tensors that it reads or writes stay where they are. The caller may change a part's tensor in place before
        it asks for the next part.
        """
        # A function that computes something before it gives its generator would do so outside the graphs.
        assert inspect.isgeneratorfunction(work)
        if not (self.enabled and _recordable(inputs)):
            yield from work(*inputs)
            return
        key: Hashable = kind, tuple(None if each is None else (each.device, each.dtype, each.shape) for each in inputs)
        recording = self._recordings.get(key)
        if recording is not None:
            for place, each in zip(recording.inputs, inputs, strict=True):
                if place is not None and each is not None:
                    place.copy_(each)
            for replay, made in recording.parts:
                replay()
                yield made
            return
        copies = [None if each is None else each.clone() for each in inputs]  # aligned as those of a graph
        recorded = sum(each is not None for each in self._recordings.values())
        if key not in self._recordings or recorded >= MAX_RECORDINGS:
            self._recordings[key] = None
            yield from work(*copies)
            return
        recording = _Recording(copies, [])
        yield from _record(work, recording, num_parts)
        self._recordings[key] = recording
        log.info("%s: recorded as %d CUDA graph(s)", kind[0], num_parts)


def _record(work: Work, recording: _Recording, num_parts: int) -> Iterator[Tensor]:
    """Record each part and run it: recording alone computes nothing."""
    pool, parts = torch.cuda.graph_pool_handle(), work(*recording.inputs)
    for _ in range(num_parts):
        replay, made = _recorded(parts, pool)
        recording.parts.append((replay, made))
        replay()
        yield made


def _recordable(inputs: Inputs) -> bool:
    return any(each is not None and each.is_cuda for each in inputs)


def _recorded(parts: Iterator[Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """The next part's graph, and what it makes."""
    graph = torch.cuda.CUDAGraph()
    # Threads that load data or watch over collectives may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        made = next(parts)
    return graph.replay, made
