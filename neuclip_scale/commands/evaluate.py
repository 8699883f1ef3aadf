"""`neuclip evaluate RUN_OR_MODEL --data FOLDER [--suite datacomp]`"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from neuclip_scale.commands.evaluate_suite import is_whole, run_datacomp
from neuclip_scale.commands.scores import demo_caveat, print_scores
from neuclip_scale.config import ConfigError
from neuclip_scale.files import write_json

if TYPE_CHECKING:
    import torch

    from neuclip_scale.evaluation.encoders import Encoders
    from neuclip_scale.models.clip import CLIP
    from neuclip_scale.models.tokenizer import Tokenizer


class ModelError(ValueError):
    """Weights that are no model of ours; the message says what does not fit."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Zero-shot accuracy and retrieval of a model, beside what guessing gives; or DataComp's 38 tasks."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, a checkpoint folder, or an open_clip model (folder or weights file)."""
    data: Path
    """A folder in clip_benchmark's webdataset layout, or one that holds several."""
    suite: Literal["sets", "datacomp"] = "sets"
    """sets: every set under the data folder; datacomp: the 38 tasks, their own metrics, DataComp's averages. Under
    torchrun or srun the ranks divide the pictures of both."""
    tasks: tuple[str, ...] = ()
    """Of datacomp: keys, names or groups (imagenet, shifts, vtab, retrieval, other); all by default."""
    output: Path | None = None
    """Of datacomp: folder of the results; RUN/datacomp by default. What is there is taken over while model and data
    are the same."""
    hub: bool = False
    """Of datacomp: fetch the sets that are not under the data folder from the Hugging Face hub."""
    any_size: bool = False
    """Of datacomp: average also over sets that have not DataComp's number of samples."""
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
    """Run the command; returns 0 when everything asked for was evaluated, 1 when not, 2 for bad usage."""
    arguments = tyro.cli(EvaluateArguments, args=argv, prog="neuclip evaluate")
    if fault := _bad_usage(arguments):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    # torch and the models take seconds to import: not before the arguments are known to be good.
    from neuclip_scale import distributed
    from neuclip_scale.checkpoint import CheckpointError
    from neuclip_scale.evaluation.datacomp.tasks import SuiteError
    from neuclip_scale.evaluation.datasets import EvaluationDataError

    try:
        status = _evaluate_datacomp(arguments) if arguments.suite == "datacomp" else _evaluate_sets(arguments)
    except (ConfigError, SuiteError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (CheckpointError, EvaluationDataError, ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    finally:
        distributed.shutdown()
    distributed.end_rank(status)
    return status


def _bad_usage(arguments: EvaluateArguments) -> str:
    if arguments.batch_size < 1:
        return f"--batch-size {arguments.batch_size}: give at least 1."
    for name, path in (("RUN_OR_MODEL", arguments.model), ("--data", arguments.data)):
        if not path.exists() and not (name == "--data" and arguments.hub):
            return f"{name} {path}: there is no such file or folder."
    if fault := _ignored(arguments):
        return fault
    if arguments.suite == "sets":
        for option in ("tasks", "output", "hub", "any_size"):
            if getattr(arguments, option):
                return f"--{option.replace('_', '-')} belongs to --suite datacomp, which is not asked for."
    elif arguments.figures:
        return "--figures draws no page of --suite datacomp: leave it out."
    elif not arguments.output and not (arguments.model / "checkpoints").is_dir():
        return f"{arguments.model} is no run folder that could take the results: give --output FOLDER."
    return ""


def _ignored(arguments: EvaluateArguments) -> str:
    """What is asked of a model that says it itself, or has no such thing."""
    if _is_ours(arguments.model):
        return "--preset: the run says what its model is. Leave it out." if arguments.preset else ""
    if arguments.weights != "auto":
        return f"--weights {arguments.weights}: {arguments.model} is no run folder and no checkpoint. Leave it out."
    return ""


def _is_ours(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or (path / "checksums.json").is_file()


def _evaluate_sets(arguments: EvaluateArguments) -> int:
    from neuclip_scale import distributed
    from neuclip_scale.evaluation.suite import evaluate_folder

    encoders = _encoders(arguments)
    result = evaluate_folder(
        encoders.model,
        arguments.data,
        encoders.tokenizer,
        encoders.transform,
        encoders.device,
        encoders.batch_size,
        encoders.share,
    )
    if distributed.is_main():
        if arguments.figures:
            _draw_figures(arguments, encoders, arguments.figures)
        print_scores(result, demo_caveat(arguments.data))
        _write(arguments, {"evaluation": result})
    return 0


def _evaluate_datacomp(arguments: EvaluateArguments) -> int:
    from neuclip_scale import distributed

    summary = run_datacomp(
        _encoders(arguments),
        arguments.data,
        arguments.output or arguments.model / "datacomp",
        arguments.tasks,
        hub=arguments.hub,
        any_size=arguments.any_size,
    )
    if distributed.is_main():
        _write(arguments, summary)
    return 0 if is_whole(summary) else 1


def _encoders(arguments: EvaluateArguments) -> Encoders:
    """The model on this rank's device, and this rank's share of the pictures (collective under a launcher)."""
    from neuclip_scale import distributed
    from neuclip_scale.data.transforms import EvalTransform
    from neuclip_scale.evaluation.encoders import Encoders
    from neuclip_scale.evaluation.sharing import agree, my_share

    device = _device(arguments.device)
    if distributed.read_launch().world_size > 1:
        if device.index is not None:
            raise ConfigError("device", arguments.device, "every rank has a GPU of its own", "Give cpu, cuda or auto.")
        # With --hub the other ranks wait while rank 0 fetches, which can take hours.
        device = distributed.initialize(device.type, 24 * 60.0 if arguments.hub else 30.0)
    share = my_share()
    model, tokenizer = agree(share, lambda: _load(arguments))
    model.to(device)
    transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
    return Encoders(model, tokenizer, transform, device, arguments.batch_size, share)


def _write(arguments: EvaluateArguments, result: dict[str, Any]) -> None:
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"model": str(arguments.model), "data": str(arguments.data), **result})


def _device(name: str) -> torch.device:
    import torch

    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError("device", name, "no such device", "Give cpu, cuda, cuda:1 or auto.") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            found = f"torch finds {torch.cuda.device_count()} GPU(s) here"
            raise ConfigError("device", name, found, "Give another, or auto; `neuclip doctor` looks for the cause.")
        if device.type not in ("cpu", "cuda"):
            try:
                torch.zeros(1, device=device).item()
            except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device has its own
                problem = f"torch computes nothing on it ({error})"
                raise ConfigError("device", name, problem, "Give cpu, cuda, cuda:1 or auto.") from error
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(arguments: EvaluateArguments) -> tuple[CLIP, Tokenizer]:
    path = arguments.model
    from neuclip_scale.checkpoint import load_run_model
    from neuclip_scale.models.loading import load_pretrained
    from neuclip_scale.models.tokenizer import CLIPTokenizer, build_tokenizer

    if _is_ours(path):
        model, recipe = load_run_model(path, arguments.weights)
        return model, build_tokenizer(recipe.model)
    try:
        model = load_pretrained(path, preset=arguments.preset)
    except ConfigError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    return model.eval(), CLIPTokenizer(model.context_length)


def _draw_figures(arguments: EvaluateArguments, encoders: Encoders, folder: Path) -> None:
    """On one rank alone."""
    from neuclip_scale.evaluation.figures import loss_curve
    from neuclip_scale.evaluation.pages import draw_retrieval_pages
    from neuclip_scale.evaluation.sharing import ALL

    draw_retrieval_pages(dataclasses.replace(encoders, share=ALL), arguments.data, folder)
    metrics = arguments.model / "metrics.jsonl"
    if metrics.is_file():
        loss_curve({arguments.model.name: metrics}, folder / "loss.png")
