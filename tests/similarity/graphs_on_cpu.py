"""What stands for CUDA graphs on a CPU: the same operations on the same tensors again, and nothing else of the work.

As on a GPU, recording changes nothing, memory taken inside belongs to others between two replays, and of tensors made
outside only those that are known to stay may be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from neuclip_scale.normalizers import replaying, triton_npn


def take_the_place_of_cuda(monkeypatch: pytest.MonkeyPatch, staying: Sequence[Tensor]) -> None:
    """From now on `replaying` records on the CPU; `staying` are the tensors outside that the work may use."""
    launch = triton_npn._launch
    inputs: list[Tensor] = []
    made: dict[int, list[Tensor]] = {}

    def record(work: Any, recording: replaying._Recording, num_parts: int) -> Iterator[Tensor]:
        inputs.extend(each for each in recording.inputs if each is not None)
        return original(work, recording, num_parts)

    def recorded(parts: Iterator[Tensor], pool: int) -> tuple[Callable[[], None], Tensor]:
        graph = Graph([*staying, *inputs], made.setdefault(pool, []))

        def launched(*arguments: Any, **flags: Any) -> None:
            graph.note(lambda: launch(*arguments, **flags), arguments)

        there = [*staying, *inputs, *made[pool]]
        before = [each.clone() for each in there]
        monkeypatch.setattr(triton_npn, "_launch", launched)
        with graph:
            result = next(parts)
        monkeypatch.setattr(triton_npn, "_launch", launch)
        for each, value in zip(there, before, strict=True):
            each.copy_(value)
        return graph.replay, result

    original = replaying._record
    pools = iter(range(1 << 30))
    monkeypatch.setattr(replaying, "_record", record)
    monkeypatch.setattr(replaying, "_recorded", recorded)
    monkeypatch.setattr(replaying, "_recordable", lambda inputs: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))


class Graph(TorchDispatchMode):
    """Operations that are noted while they run, and can be run again."""

    def __init__(self, known: list[Tensor], made: list[Tensor]) -> None:
        """`made` are those of earlier parts, and new ones join them."""
        super().__init__()
        self._known, self._made, self._first = known, made, not made
        self._calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self._check(given)
        result = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        places = {place(each) for each in given}
        new = [number for number, each in enumerate(outputs) if place(each) not in places]
        self._made += [outputs[number] for number in new]

        def again() -> None:
            results = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for number in new:
                outputs[number].copy_(results[number])
                if "empty" in func.name():
                    poison(outputs[number])

        self._calls.append(again)
        return result

    def note(self, call: Callable[[], None], arguments: Sequence[Any]) -> None:
        """Run a kernel, and again in each replay."""
        self._check([each for each in arguments if isinstance(each, Tensor)])
        self._calls.append(call)
        with _disable_current_modes():
            call()

    def replay(self) -> None:
        """Run everything; a first part finds in the memory of the graphs what others have left there."""
        if self._first:
            for each in self._made:
                poison(each)
        for call in self._calls:
            call()

    def _check(self, used: Sequence[Tensor]) -> None:
        known = {place(each) for each in (*self._known, *self._made)}
        assert all(place(each) in known for each in used), "a tensor that may be gone when the graph is replayed"


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def poison(tensor: Tensor) -> None:
    tensor.fill_(torch.nan if tensor.is_floating_point() else -77)
