"""`neuclip export RUN --format open_clip|hf|safetensors --output DIR`"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from neuclip_scale.config import ConfigError, Recipe, dump_recipe
from neuclip_scale.files import is_occupied, new_folder, write_text
from neuclip_scale.run_folder import read_object, row_of_step

if TYPE_CHECKING:
    from neuclip_scale.models.clip import CLIP


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write the model of a run as open_clip, transformers or plain safetensors read it, with a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder (its newest checkpoint) or a checkpoint folder."""
    format: Literal["open_clip", "hf", "safetensors"]
    """open_clip: for create_model_from_pretrained("local-dir:DIR"). hf: for CLIPModel.from_pretrained("DIR"), with
    tokenizer and image processor. safetensors: the tensors under this project's names."""
    output: Path
    """Folder to write; it must not hold anything yet."""
    weights: Literal["auto", "last", "ema"] = "auto"
    """Those of the last step, their running average, or the average where the run kept one."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 for a run without an intact checkpoint, 2 for bad usage."""
    arguments = tyro.cli(ExportArguments, args=argv, prog="neuclip export")
    if is_occupied(arguments.output):
        print(f"error: --output {arguments.output}: not empty, or no folder. Give a new folder.", file=sys.stderr)
        return 2
    from neuclip_scale.checkpoint import CheckpointError, load_run_model

    try:
        model, recipe = load_run_model(arguments.run, arguments.weights)
        with new_folder(arguments.output) as folder:
            _save(model, recipe, arguments.format, folder)
            card = model_card(arguments.run, recipe, arguments.format, arguments.weights)
            write_text(folder / "README.md", card)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}")
    return 0


def _save(model: CLIP, recipe: Recipe, form: str, folder: Path) -> None:
    from neuclip_scale.models.export import save_hf, save_open_clip, save_tensors
    from neuclip_scale.models.presets import preset_of

    if form == "safetensors":
        save_tensors(model, folder / "model.safetensors")
        return
    for field in ("image_tower", "text_tower"):
        if getattr(recipe.model, field):
            raise ConfigError(
                "format",
                form,
                f"the run has another tower, model.{field} = {getattr(recipe.model, field)}",
                "Use --format safetensors.",
            )
    save = save_open_clip if form == "open_clip" else save_hf
    save(model, preset_of(recipe.model), folder)


USE = {
    "open_clip": 'model, preprocess = open_clip.create_model_from_pretrained("local-dir:THIS_FOLDER")',
    "hf": 'model = transformers.CLIPModel.from_pretrained("THIS_FOLDER")',
    "safetensors": 'tensors = safetensors.torch.load_file("model.safetensors")',
}


def model_card(run: Path, recipe: Recipe, form: str, weights: str = "auto") -> str:
    """Markdown: how to load the model, what it was trained on and how, what it scores, what it has cost."""
    averaged = recipe.optim.ema_decay > 0
    told = ["The weights are those of the last step."]
    if averaged and weights == "last":
        told = ["The weights are those of the last step, and the scores below those of their running average."]
    elif averaged:
        told = [f"The weights are a running average of the steps' (decay {recipe.optim.ema_decay:g})."]
    summary = _known(run.resolve())
    lines = [
        f"# {recipe.name}: {recipe.model.preset} trained by {recipe.objective.name}",
        "",
        f"    {USE[form]}",
        "",
        *told,
        "",
        "## Data",
        "",
        f"`{recipe.data.train}`: {summary.get('dataset_size', 'an unknown number of')} pairs, "
        f"{summary.get('samples_seen', 'unknown')} seen, {summary.get('samples_skipped', 'unknown')} skipped.",
        *_audit(summary.get("audit")),
        "",
        "## Results",
        "",
        *_scores(summary.get("evaluation", {})),
        "",
        "## Cost",
        "",
        *_cost(summary.get("cost", {})),
        "",
        "## Settings",
        "",
        "```yaml",
        dump_recipe(recipe).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _known(run: Path) -> dict[str, Any]:
    """What the run's summary says; of a checkpoint of an earlier step what was known at that."""
    step = re.fullmatch(r"step_(\d+)", run.name)
    if run.parent.name != "checkpoints" or step is None:
        return read_object(run / "summary.json")
    whole = run.parent.parent
    summary = read_object(whole / "summary.json")
    if summary.get("step") == int(step[1]):
        return summary
    then = row_of_step(whole / "evaluations.jsonl", int(step[1]))
    return {name: summary[name] for name in ("dataset_size", "audit") if name in summary} | then


def _audit(audit: dict[str, Any] | None) -> list[str]:
    if not audit:
        return []
    return [f"The data passed `neuclip audit` (download {audit['download']}, digest {audit['digest']})."]


def _scores(evaluation: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in evaluation.items():
        if isinstance(value, dict):
            lines += _scores(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            lines.append(f"- {prefix}{name}: {value:.4f}")
    return lines if prefix else lines or ["Not evaluated."]


def _cost(cost: dict[str, Any]) -> list[str]:
    kept = {
        name: cost[name] for name in ("device_hours", "train_seconds", "energy_joules", "energy_source") if name in cost
    }
    return [f"- {name}: {value}" for name, value in kept.items()] or ["Not known."]
