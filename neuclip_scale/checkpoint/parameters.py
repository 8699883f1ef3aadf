"""Parameters and optimizer state in a checkpoint: whole tensors by name, spread evenly over the ranks' files.

An engine's sharding leaves no trace in them, so any engine on any number of ranks can go on from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.checkpoint.layout import CheckpointError
from neuclip_scale.models.misfit import misfits

if TYPE_CHECKING:
    from neuclip_scale.engines import Engine

NamedState = dict[str, dict[str, Tensor]]


def keep_share(named_state: Iterable[tuple[str, dict[str, Tensor]]]) -> NamedState:
    """Copies of the parameters that this rank writes, on the CPU (collective where `named_state` is).

    Each goes to the rank that has the least so far, the same on all ranks without communication.
    """
    loads, kept = [0] * distributed.world_size(), {}
    for name, tensors in named_state:
        owner = loads.index(min(loads))
        loads[owner] += sum(tensor.nbytes for tensor in tensors.values())
        if owner == distributed.rank():
            kept[name] = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
    return kept


def collect(ranks: Sequence[Mapping[str, Any]]) -> NamedState:
    """All parameters, from all ranks' parts of a checkpoint."""
    return {name: tensors for part in ranks for name, tensors in part["parameters"].items()}


def load_parameters(engine: Engine, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Give `engine` the parameters and optimizer state of all ranks' parts (collective under ZeRO).

    Raises CheckpointError, with the differences, if names or shapes are not the model's.
    """
    saved = collect(ranks)
    problems = misfits({name: tensors["value"].shape for name, tensors in saved.items()}, engine.shapes())
    if problems:
        raise CheckpointError(f"the checkpoint is of another model. {problems} Use the recipe it came from.")
    engine.load_named_state(lambda name: dict(saved[name]))
