"""What a training step really sends: every collective that reaches torch.distributed, with the bytes it is given."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "_c10d_functional::all_reduce": "all_reduce",
}


class Collectives(TorchDispatchMode):
    """Sums of bytes by kind: the larger of what goes in and comes out. Unknown collectives are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(each is DTensor for each in types):
            return NotImplemented  # its own collectives come here one by one
        if func.namespace == "c10d" or (func.namespace == "_c10d_functional" and "wait" not in func.name()):
            if not func.name().startswith("_c10d_functional::_wrap"):
                sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
                kind = KINDS[func.name()]
                size = max(sizes) if kind in ("all_gather", "reduce_scatter") else sum(sizes)
                self.bytes[kind] = self.bytes.get(kind, 0) + size
        return func(*args, **(kwargs or {}))


def sent_in_a_step(folder: str, overrides: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by kind in the third step of a run on this process group (collective)."""
    from neuclip_scale.config import load_recipe
    from neuclip_scale.trainer import Trainer

    run_dir = Path(folder) / f"run{next(_numbers)}"
    trainer = Trainer(load_recipe("demo", {**overrides, "run_dir": str(run_dir)}))
    batches = iter(trainer.loader)
    recorded = Collectives()
    for _ in range(3):
        loaded = next(batches)
        recorded = Collectives()
        with recorded:
            result = trainer.train_step(loaded.batch)
            trainer._reduce(result, loaded, False)
        trainer.run_state.step += 1
    shutil.rmtree(run_dir, ignore_errors=True)
    return recorded.bytes


_numbers = itertools.count()


def each(folder: str, cases: list[Mapping[str, Any]], measure: Callable[[str, Mapping[str, Any]], Any]) -> list[Any]:
    """`measure` of every case, one after the other (collective)."""
    return [measure(folder, case) for case in cases]
