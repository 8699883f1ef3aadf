"""Stages `train/RUN` and `evaluate/RUN`: one each of every method and seed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from neuclip_scale.config import ConfigError, Recipe, check_recipe, dump_recipe, load_recipe
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
    if experiment.suite == "sets":
        values["evaluation.data"] = str(request.sets)
    fixed = [f"{name}={_yaml(value)}" for name, value in values.items()]
    return [experiment.recipe, *_chosen(request, method), *fixed, *request.overrides]


def _chosen(request: Request, method: str) -> tuple[str, ...]:
    return (*request.experiment.overrides, *request.experiment.method_overrides.get(method, ()))


def _yaml(value: Any) -> str:
    """As an override: in quotation marks only where YAML would read something else."""
    plain = str(value)
    return plain if yaml.safe_load(plain) == value else json.dumps(value)


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
        # Sets that are missing are told in the report; what is there is evaluated.
        arguments += ["--suite", "datacomp", *([] if request.evaluation else ["--hub"])]
    settings = {"suite": suite, "sets": str(request.sets)}
    return Stage(
        f"evaluate/{label}", (f"train/{label}",), settings, (neuclip(*arguments, accepted=(0, 1)),),
        read=lambda: _evaluated(result), kind="evaluate", produces=(result,),
    )  # fmt: skip


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a training of this very recipe has come to its end there."""
    if read_object(folder / "summary.json").get("status") != "finished":
        return False
    try:
        trained = load_recipe(folder / "config.yaml")
    except ConfigError:
        return False
    return dump_recipe(trained) == dump_recipe(recipe)


def _trained(folder: Path) -> dict[str, Any]:
    summary = read_object(folder / "summary.json")
    if summary.get("status") != "finished":
        raise ReproduceError(f"{folder}: is not finished. Give the same command again, it goes on.")
    return {name: summary[name] for name in ("step", "samples_seen", "epochs", "train_seconds", "device_hours")}


def _evaluated(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if not found:
        raise ReproduceError(f"{path}: no scores were written. Look into the stage's log.")
    return {}
