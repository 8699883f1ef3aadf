"""What a checkpoint says about the run that wrote it: its recipe and its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from neuclip_scale.checkpoint.layout import CHECKSUMS_FILE, CheckpointError
from neuclip_scale.checkpoint.parameters import collect
from neuclip_scale.checkpoint.reading import latest_checkpoint, load_all_ranks
from neuclip_scale.config import ConfigError, Recipe, parse, recipe_changes
from neuclip_scale.engines.averaging import AVERAGE

Weights = Literal["auto", "last", "ema"]

if TYPE_CHECKING:
    from neuclip_scale.models.clip import CLIP

# They change memory and speed only; a run may go on with another value.
FREE_TO_CHANGE = {
    "model.grad_checkpointing", "model.compile", "model.cuda_graphs", "objective.tile_size", "objective.exchange",
    "objective.npn.cuda_graphs",
}  # fmt: skip


def saved_recipe(shared: Mapping[str, Any]) -> Recipe:
    """The recipe a checkpoint was trained with, from its shared part."""
    return parse(Recipe, yaml.safe_load(shared["recipe"]))


def check_compatible(saved_recipe: Recipe, recipe: Recipe) -> None:
    """Raise ConfigError, listing the fields, if `recipe` has another model, objective or optimizer than the saved."""
    different = [
        f"{name} ({there!r} there, {here!r} here)"
        for name, (there, here) in recipe_changes(saved_recipe, recipe).items()
        # What one optimizer keeps is not what another one reads, or means something else to it.
        if (name.startswith(("model.", "objective.")) or name == "optim.name") and name not in FREE_TO_CHANGE
    ]
    if different:
        listed = ", ".join(different)
        problem = f"the checkpoint is of another model, objective or optimizer: {listed}"
        raise ConfigError("resume", recipe.resume, problem, "Use the same values, or another run_dir.")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder `path`, or the newest intact one of the run folder `path`; raises CheckpointError."""
    path = Path(path)
    chosen = path if (path / CHECKSUMS_FILE).exists() else latest_checkpoint(path / "checkpoints")
    if chosen is None:
        raise CheckpointError(f"{path} has no intact checkpoint. Give a run folder or RUN/checkpoints/step_N.")
    return chosen


def load_run_model(path: Path, weights: Weights = "auto") -> tuple[CLIP, Recipe]:
    """The model of a run folder (its newest checkpoint) or a checkpoint folder, in eval mode on the CPU.

    `weights`: those of the last step, their running average, or (auto) the average where the run kept one. Raises
    CheckpointError if `path` holds no intact checkpoint, or no average where one is asked for.
    """
    from neuclip_scale.models.building import fill, plan_model

    chosen = find_checkpoint(path)
    shared, ranks = load_all_ranks(chosen)
    recipe = saved_recipe(shared)
    # Its own weights follow: not the pretrained ones, which may be gone. Nor are programs made for a few batches.
    model = fill(plan_model(recipe, compiled=False))
    kept = collect(ranks)
    if weights == "ema" and not any(AVERAGE in tensors for tensors in kept.values()):
        raise CheckpointError(f"{chosen} has no running average. Train with optim.ema_decay, or take the last weights.")
    first = "value" if weights == "last" else AVERAGE
    values = {name: tensors.get(first, tensors["value"]) for name, tensors in kept.items()}
    model.load_state_dict({**values, **shared["buffers"]})
    return model.eval(), recipe
