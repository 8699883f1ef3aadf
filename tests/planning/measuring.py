"""What a training step really holds and sends on real gloo ranks."""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
    "_c10d_functional::all_reduce": "all_reduce",
}
SEEN_EARLIER = 3
"""Steps before the measured one: DDP rearranges its buckets in the first, and optimizers make their state."""


class Watch(TorchDispatchMode):
    """Bytes of all live storages after every operation, and bytes given to every collective.

    A collective that is unknown here stands under its own name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._large: dict[int, Any] = {}  # FSDP2 empties storages without an operation
        self._bytes = 0
        self.peak = 0
        self.sent: dict[str, int] = {}
        self.order: list[str] = []

    @property
    def live(self) -> int:
        """Bytes of all that is there now and was seen."""
        return self._bytes

    def begin(self) -> None:
        """Forget what was measured; what is live stays."""
        self.peak, self.sent, self.order = 0, {}, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(each is DTensor for each in types):
            return NotImplemented  # its own operations come here one by one
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._note_collective(func.name(), [tensor.nbytes for tensor in tensors])
        result = func(*args, **(kwargs or {}))
        for tensor in [*tensors, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))]:
            if tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        for place, reference in list(self._large.items()):
            self._resize(place, reference())
        self.peak = max(self.peak, self._bytes)
        return result

    def _note_collective(self, name: str, sizes: list[int]) -> None:
        if not name.startswith(("c10d::", "_c10d_functional::")) or any(
            part in name for part in ("wait", "_wrap", "recv")
        ):
            return
        kind = KINDS.get(name, name)
        size = max(sizes) if kind in ("all_gather", "all_to_all", "reduce_scatter") else sum(sizes)
        self.sent[kind] = self.sent.get(kind, 0) + size
        self.order.append(kind)

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._sizes:
            self._resize(place, storage)
            return
        self._sizes[place] = 0
        self._resize(place, storage)
        weakref.finalize(storage, self._drop, place)
        if storage.nbytes() > 2**20:
            self._large[place] = weakref.ref(storage)

    def _resize(self, place: int, storage: torch.UntypedStorage | None) -> None:
        if storage is not None:
            self._bytes += storage.nbytes() - self._sizes[place]
            self._sizes[place] = storage.nbytes()

    def _drop(self, place: int) -> None:
        self._bytes -= self._sizes.pop(place)
        self._large.pop(place, None)


class Measured(NamedTuple):
    peak: int
    sent: dict[str, int]
    order: list[str]
    """Kind of each collective, as they were started."""


_numbers = itertools.count()


def measure(folder: str, cases: list[Mapping[str, Any]]) -> list[Measured]:
    """Peak and traffic of a step of each run, one after the other (collective)."""
    return [_measure(folder, case) for case in cases]


def _measure(folder: str, overrides: Mapping[str, Any]) -> Measured:
    from neuclip_scale.config import load_recipe
    from neuclip_scale.launched_step import QueuedNumbers
    from neuclip_scale.trainer import Trainer

    run_dir = Path(folder) / f"run{next(_numbers)}"
    with Watch() as watch:
        trainer = Trainer(load_recipe("demo", {**overrides, "run_dir": str(run_dir)}))
        batches = iter(trainer.loader)
        for _ in range(1 + SEEN_EARLIER):
            loaded = next(batches)
            watch.begin()
            result = trainer.train_step(loaded.batch)
            QueuedNumbers(result, loaded).read()
            del result
            trainer.run_state.launched += 1
    shutil.rmtree(run_dir, ignore_errors=True)
    return Measured(watch.peak, watch.sent, watch.order)


def allocated(folder: str, cases: list[Mapping[str, Any]]) -> list[int]:
    """Peak of a step of each run by the allocator's own events, operations' scratch memory included; of one rank only,
    since gloo's threads free tensors where the profiler does not look.
    """
    return [_allocated(folder, case) for case in cases]


def _allocated(folder: str, overrides: Mapping[str, Any]) -> int:
    from torch.profiler import ProfilerActivity, profile, record_function

    from neuclip_scale.config import load_recipe
    from neuclip_scale.trainer import Trainer

    run_dir = Path(folder) / f"run{next(_numbers)}"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(load_recipe("demo", {**overrides, "run_dir": str(run_dir)}))
        batches = iter(trainer.loader)
        for number in range(2):
            loaded = next(batches)
            with record_function(f"step {number}"):
                trainer.train_step(loaded.batch)
            trainer.run_state.launched += 1
    events = profiler.profiler.kineto_results.events()
    (step,) = (event for event in events if event.name() == "step 1")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for time, change in changes:
        live += change
        if step.start_ns() <= time <= step.end_ns():
            peak = max(peak, live)
    shutil.rmtree(run_dir, ignore_errors=True)
    return peak
