"""`neuclip evaluate RUN_OR_MODEL --data FOLDER`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from neuclip_scale.commands.scores import demo_caveat, print_scores
from neuclip_scale.config import ConfigError
from neuclip_scale.files import write_json

if TYPE_CHECKING:
    import torch

    from neuclip_scale.models.clip import CLIP
    from neuclip_scale.models.tokenizer import Tokenizer


class ModelError(ValueError):
    """Weights that are no model of ours; the message says what does not fit."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Zero-shot accuracy and retrieval of a model, beside what guessing gives."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, a checkpoint folder, or an open_clip model (folder or weights file)."""
    data: Path
    """A folder in clip_benchmark's webdataset layout, or one that holds several."""
    json: Path | None = None
    """Also write the scores to this file."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU when there is one."""
    batch_size: int = 256
    """Pictures or texts encoded at a time."""
    preset: str = ""
    """Architecture of a bare weights file (ViT-B-32, ...); runs and open_clip folders say it themselves."""
    weights: Literal["auto", "last", "ema"] = "auto"
    """Of a run: those of the last step, their running average, or the average where the run kept one."""
    figures: Path | None = None
    """Also draw a page of results of each retrieval set, and the run's loss, into this folder."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when every set was evaluated, 1 when that failed, 2 for bad usage."""
    arguments = tyro.cli(EvaluateArguments, args=argv, prog="neuclip evaluate")
    if arguments.batch_size < 1:
        print(f"error: --batch-size {arguments.batch_size}: give at least 1.", file=sys.stderr)
        return 2
    for name, path in (("RUN_OR_MODEL", arguments.model), ("--data", arguments.data)):
        if not path.exists():
            print(f"error: {name} {path}: there is no such file or folder.", file=sys.stderr)
            return 2
    # torch and the models take seconds to import: not before the arguments are known to be good.
    from neuclip_scale.checkpoint import CheckpointError
    from neuclip_scale.data.transforms import EvalTransform
    from neuclip_scale.evaluation.datasets import EvaluationDataError
    from neuclip_scale.evaluation.suite import evaluate_folder

    try:
        device = _device(arguments.device)
        model, tokenizer = _load(arguments)
        model.to(device)
        transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
        result = evaluate_folder(model, arguments.data, tokenizer, transform, device, arguments.batch_size)
        if arguments.figures:
            _draw_figures(arguments, model, tokenizer, transform, device)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, EvaluationDataError, ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_scores(result, demo_caveat(arguments.data))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            arguments.json,
            {"model": str(arguments.model), "data": str(arguments.data), "evaluation": result},
        )
    return 0


def _device(name: str) -> torch.device:
    import torch

    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ConfigError("device", name, "no such device", "Give cpu, cuda, cuda:1 or auto.") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(arguments: EvaluateArguments) -> tuple[CLIP, Tokenizer]:
    path = arguments.model
    from neuclip_scale.checkpoint import load_run_model
    from neuclip_scale.models.loading import load_pretrained
    from neuclip_scale.models.tokenizer import CLIPTokenizer, build_tokenizer

    if (path / "checkpoints").is_dir() or (path / "checksums.json").is_file():
        model, recipe = load_run_model(path, arguments.weights)
        return model, build_tokenizer(recipe.model)
    try:
        model = load_pretrained(path, preset=arguments.preset)
    except ConfigError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    return model.eval(), CLIPTokenizer(model.context_length)


def _draw_figures(
    arguments: EvaluateArguments, model: CLIP, tokenizer: Tokenizer, transform: Any, device: torch.device
) -> None:
    from neuclip_scale.evaluation.figures import loss_curve
    from neuclip_scale.evaluation.pages import draw_retrieval_pages

    folder = arguments.figures
    assert folder is not None
    draw_retrieval_pages(model, arguments.data, tokenizer, transform, device, folder, arguments.batch_size)
    metrics = arguments.model / "metrics.jsonl"
    if metrics.is_file():
        loss_curve({arguments.model.name: metrics}, folder / "loss.png")
