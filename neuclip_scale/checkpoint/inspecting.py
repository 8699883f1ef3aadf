"""What a checkpoint holds, in words and numbers, and its tensors in other forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from neuclip_scale.checkpoint.parameters import collect
from neuclip_scale.checkpoint.reading import load_all_ranks, read_checksums
from neuclip_scale.checkpoint.runs import saved_recipe
from neuclip_scale.files import new_folder

Form = Literal["dcp", "safetensors"]
_TENSORS = "checkpoint.safetensors"


def describe(path: Path) -> dict[str, Any]:
    """Verify every byte of checkpoint `path` and list its content; raises CheckpointError."""
    checksums = read_checksums(path)
    shared, ranks = load_all_ranks(path)  # verifies what it reads, which is all
    recipe = saved_recipe(shared)
    parameters = collect(ranks)
    kept: dict[str, int] = {}
    for tensors in parameters.values():
        for key, tensor in tensors.items():
            kept[key] = kept.get(key, 0) + tensor.nbytes
    return {
        "format": checksums["format"],
        "step": shared["step"],
        "samples_seen": shared["samples_seen"],
        "recipe": recipe.name,
        "model": recipe.model.preset,
        "objective": recipe.objective.name,
        "engine": recipe.engine.name,
        "world_size": checksums["world_size"],
        "parameters": sum(tensors["value"].numel() for tensors in parameters.values()),
        "bytes_by_kind": kept,
        "normalizer_bytes": _bytes(shared["objective"]) + sum(_bytes(part["objective"]) for part in ranks),
        "samples_read": shared["num_read"],
        "samples_skipped": shared["num_skipped"],
        "stream_positions": f"{len(shared['stream_positions'])} streams",
        "data_fingerprint": shared["data_fingerprint"],
        "train_seconds": round(shared["train_seconds"], 1),
        "torch_version": shared["torch_version"],
        "files": {name: entry["size"] for name, entry in checksums["files"].items()},
    }


def convert(path: Path, form: Form, output: Path) -> Path:
    """Write parameters and optimizer state of checkpoint `path` into the folder `output`; returns what was written.

    Tensors are called `NAME/value`, and `NAME/exp_avg` and so on for what the optimizer keeps of NAME. Raises
    CheckpointError.
    """
    _, ranks = load_all_ranks(path)
    flat = {f"{name}/{key}": tensor for name, tensors in collect(ranks).items() for key, tensor in tensors.items()}
    with new_folder(output) as folder:
        if form == "dcp":
            import torch.distributed.checkpoint as dcp

            dcp.save(flat, checkpoint_id=folder, no_dist=True)
            return output
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous() for name, tensor in flat.items()}
        save_file(whole, folder / _TENSORS, metadata={"format": "pt"})
        return output / _TENSORS


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
