"""Stages `train/RUN` and `evaluate/RUN`: one each of every method and seed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from neuclip_scale.config import Recipe, check_recipe, dump_recipe, load_recipe
from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.stages import Command, Stage, neuclip
from neuclip_scale.run_folder import read_object


def train_arguments(request: Request, label: str) -> list[str]:
    """RECIPE and `section.field=value` of one run, the user's own last."""
    experiment, places = request.experiment, request.places
    method, seed = request.labels[label]
    values: dict[str, Any] = {
        "run_dir": str(places.run(label)), "data.train": str(places.manifest),
        "data.require_audit": str(places.shards_audit / "audit.json"), "objective.name": method, "seed": seed,
    }  # fmt: skip
    # Set in any case, so that a site's own (slurm/site.env) changes no recipe.
    values["evaluation.data"] = str(request.sets) if experiment.suite == "sets" else ""
    fixed = [f"{name}={_yaml(value)}" for name, value in values.items()]
    return [experiment.recipe, *_chosen(request, method), *fixed, *request.overrides]


def _chosen(request: Request, method: str) -> tuple[str, ...]:
    return (*request.experiment.overrides, *request.experiment.method_overrides.get(method, ()))


def _yaml(value: Any) -> str:
    """As an override: in quotation marks only where YAML would read something else."""
    plain = str(value)
    try:
        return plain if not plain or yaml.safe_load(plain) == value else json.dumps(value)
    except yaml.YAMLError:
        return json.dumps(value)


def train_stage(request: Request, label: str) -> Stage:
    """One training; a run that was cut off goes on where it stopped."""
    arguments = train_arguments(request, label)
    recipe = load_recipe(arguments[0], arguments[1:])
    check_recipe(recipe)
    command = neuclip("train", *arguments)
    if request.launcher:
        command = Command((*shlex.split(request.launcher), "neuclip", "train", *arguments))
    folder, (method, seed) = request.places.run(label), request.labels[label]
    settings = {
        "recipe": request.experiment.recipe, "method": method, "seed": seed, "overrides": _chosen(request, method),
        "set": request.overrides,
    }  # fmt: skip
    return Stage(
        f"train/{label}", ("index",), settings, (command,), read=lambda: _trained(folder), kind="train",
        was_done=lambda: _is_finished(folder, recipe), produces=(folder,),
    )  # fmt: skip


def evaluate_stage(request: Request, label: str) -> Stage:
    """The scores of one run."""
    places, suite = request.places, request.experiment.suite
    result = places.evaluation(label)
    arguments: list[Any] = ["evaluate", places.run(label), "--data", request.sets, "--json", result]
    if suite == "datacomp":
        # A set that is missing fails the stage: it is done again, with the tasks that are done, when the set is there.
        arguments += ["--suite", "datacomp", *([] if request.evaluation else ["--hub"])]
    command = neuclip(*arguments)
    settings: dict[str, Any] = {"suite": suite}
    if suite == "sets" and request.evaluation:  # DataComp's are the same wherever they lie
        settings["sets"] = str(request.evaluation)

    def evaluate(log: Path) -> None:
        result.unlink(missing_ok=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        command.run(log)

    return Stage(
        f"evaluate/{label}", (f"train/{label}",), settings, do=evaluate, kind="evaluate", produces=(result,),
        told=(command.text,), read=lambda: _whole(result),
    )  # fmt: skip


def _whole(result: Path) -> dict[str, Any]:
    """Nothing to keep; raises `ReproduceError` for tasks that were evaluated in part, which no average counts."""
    partial = [str(task["key"]) for task in read_object(result).get("incomplete", [])]
    if partial:
        raise ReproduceError(
            f"{result}: {len(partial)} task(s) were evaluated in part ({', '.join(partial[:5])}). Mend their sets and "
            "give the same command again."
        )
    return {}


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a training of this very recipe has come to its end there; raises `ReproduceError` for another's."""
    if read_object(folder / "summary.json").get("status") != "finished":
        return False
    trained, wanted = (
        yaml.safe_load(text) for text in ((folder / "config.yaml").read_text("utf-8"), dump_recipe(recipe))
    )
    sections = [name for name, value in wanted.items() if trained.get(name) != value]
    if sections:
        raise ReproduceError(
            f"{folder}: is a finished run of another recipe ({', '.join(sections)} differ; see config.yaml). Remove "
            "it, or give another --output."
        )
    return True


def _trained(folder: Path) -> dict[str, Any]:
    summary = read_object(folder / "summary.json")
    if summary.get("status") != "finished":
        raise ReproduceError(f"{folder}: is not finished. Give the same command again, it goes on.")
    return {name: summary[name] for name in ("step", "samples_seen", "epochs", "train_seconds", "device_hours")}
