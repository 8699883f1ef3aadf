"""The runs of a study, as recipes' overrides."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from neuclip_scale.config import ConfigError, ObjectiveName, Recipe, load_recipe
from neuclip_scale.objectives.temperature import WITH_RHO
from neuclip_scale.studies.methods.settings import Budget, MethodsStudy


@dataclass(frozen=True)
class Arm:
    """A method with its batch."""

    name: str
    method: str
    factor: int = 1
    """Batch over the recipe's."""
    changes: tuple[str, ...] = ()
    """`section.field=value` of this arm alone."""


@dataclass(frozen=True)
class Choice:
    """What tuning chooses for an arm; None leaves it as the recipe says."""

    learning_rate: float | None = None
    rho: float | None = None

    @property
    def label(self) -> str:
        """As folders are called: lr0.001, lr0.001-rho2."""
        parts = ("lr", self.learning_rate), ("rho", self.rho)
        return "-".join(f"{name}{value:g}" for name, value in parts if value is not None)


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    arm: Arm
    seed: int
    budget: str
    folder: Path
    overrides: dict[str, Any]


def arms(study: MethodsStudy) -> list[Arm]:
    """Methods as they are, those with a larger batch, then the variants; raises `ConfigError`."""
    plain = [Arm(method, method) for method in study.methods]
    larger = [Arm(f"{m}-x{study.larger_factor}", m, study.larger_factor) for m in study.larger if m in study.methods]
    found = plain + larger + [_variant(text) for text in study.variants]
    names = [arm.name for arm in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("variants", name, "two arms have this name", "Give each a label of its own.")
    return found


def _variant(text: str) -> Arm:
    """`LABEL:METHOD:section.field=value,...` as an arm."""
    label, _, rest = text.partition(":")
    method, _, changes = rest.partition(":")
    parts = tuple(changes.split(","))
    if not label or not method or not all(part.partition("=")[0] and "=" in part for part in parts):
        raise ConfigError("variants", text, "not LABEL:METHOD:section.field=value,...", "Say what the arm changes.")
    return Arm(label, method, changes=parts)


def check_study(study: MethodsStudy) -> None:
    """Raise `ConfigError` for settings by which nothing, or something else than was asked for, would be trained."""
    for seed in study.seeds:
        if study.seeds.count(seed) > 1:  # its one run would count as two
            raise ConfigError("seeds", list(study.seeds), f"{seed} is given twice", "Give each once.")
    given = {"methods": study.methods or study.variants, "seeds": study.seeds, "budgets": study.budgets}
    for name, values in given.items():
        if not values:
            raise ConfigError(name, [], "nothing would be trained", "Give one at least, or leave the option out.")
    least: dict[str, tuple[float, int]] = {"jobs": (study.jobs, 1), "larger_factor": (study.larger_factor, 1)}
    least |= {"tuning_steps": (study.tuning_steps, 0), "seconds": (study.seconds, 0)}
    for name, (value, smallest) in least.items():
        if not smallest <= value < math.inf:
            raise ConfigError(name, value, "too small, or no number", f"Give {smallest} or more.")
    known = get_args(ObjectiveName)
    for method in study.larger:
        if method not in known:
            raise ConfigError("larger", method, "there is no such method", f"Choose from {', '.join(known)}.")


def base_recipe(study: MethodsStudy) -> Recipe:
    """The recipe with the study's own overrides; raises `ConfigError`, also for a run whose length is in epochs."""
    overrides = [*study.overrides, *([f"data.train={study.data}"] if study.data else [])]
    recipe = load_recipe(study.recipe, overrides)
    if not recipe.train.num_steps:
        raise ConfigError("train.num_steps", 0, "a study counts steps", "Give it in --overrides train.num_steps=N.")
    return recipe


def planned(
    study: MethodsStudy,
    recipe: Recipe,
    budget: Budget,
    steps: dict[str, int],
    chosen: Mapping[str, Choice] | None = None,
) -> list[Run]:
    """All runs of one budget; `steps` and what was `chosen` are those of each arm, and one without steps is left out.

    Seed by seed, so that a killed study has whole seeds.
    """
    runs = []
    for seed in study.seeds:
        for arm in arms(study):
            if arm.name not in steps:
                continue
            folder = study.output / "runs" / budget / arm.name / f"seed{seed}"
            choice = (chosen or {}).get(arm.name, Choice())
            overrides = _overrides(recipe, arm, seed, folder, steps[arm.name], choice)
            runs.append(Run(arm, seed, budget, folder, overrides))
    return runs


def meant_to_differ(study: MethodsStudy) -> set[str]:
    """Dotted fields that arms are given each for itself; raises `ConfigError`."""
    recipe, choice = base_recipe(study), Choice(1.0, 1.0)
    given = [(arm, _overrides(recipe, arm, 0, study.output, 1, choice)) for arm in arms(study)]
    return {name for arm, own in given for name in (*own, *(change.partition("=")[0] for change in arm.changes))}


def tuning_runs(study: MethodsStudy, recipe: Recipe, steps: dict[str, int]) -> dict[str, dict[Choice, Run]]:
    """Arm -> choice -> the run that tries it. What an arm names itself it keeps; raises `ConfigError` for a tuning
    seed that is one of the study's.
    """
    if (study.learning_rates or study.rhos) and study.tuning_seed in study.seeds:
        raise ConfigError(
            "tuning_seed", study.tuning_seed, "is one of the seeds that are reported", "Take one that is not."
        )
    found: dict[str, dict[Choice, Run]] = {}
    for arm in arms(study):
        for choice in _choices(study, arm):
            folder = study.output / "runs" / "tuning" / arm.name / choice.label
            num_steps = max(1, study.tuning_steps // arm.factor) if study.tuning_steps else steps[arm.name]
            overrides = _overrides(recipe, arm, study.tuning_seed, folder, num_steps, choice)
            found.setdefault(arm.name, {})[choice] = Run(arm, study.tuning_seed, "tuning", folder, overrides)
    return found


def _choices(study: MethodsStudy, arm: Arm) -> list[Choice]:
    """Every learning rate with every rho, of what is this arm's to choose; none where nothing is."""
    named = {change.partition("=")[0] for change in arm.changes}
    rates = () if "optim.learning_rate" in named else study.learning_rates
    rhos = () if "objective.rho" in named or arm.method not in WITH_RHO else study.rhos
    if not rates and not rhos:
        return []
    return [Choice(rate, rho) for rate in rates or (None,) for rho in rhos or (None,)]


def steps_for_samples(study: MethodsStudy, recipe: Recipe) -> dict[str, int]:
    """Steps of each arm at equal samples: the recipe's, or its fraction for a larger batch; raises `ConfigError`."""
    wrong = recipe.train.num_steps % study.larger_factor
    if wrong and any(arm.factor > 1 for arm in arms(study)):
        raise ConfigError(
            "train.num_steps",
            recipe.train.num_steps,
            f"not a multiple of larger_factor = {study.larger_factor}, so the larger batches cannot see as many pairs",
            f"Use {recipe.train.num_steps - wrong}.",
        )
    return {arm.name: recipe.train.num_steps // arm.factor for arm in arms(study)}


def steps_for_seconds(
    study: MethodsStudy,
    recipe: Recipe,
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    saved: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, int], float]:
    """Steps of each arm at equal wall-clock and that time in seconds, from the summaries of its runs at equal samples.

    The time and the steps in `saved`, the plan of an earlier start, stay: those of further seeds are the same. An arm
    with neither summary nor saved steps gets none. Raises `ConfigError` for another time than the saved one.
    """
    fixed = saved.get("seconds", 0.0)
    if fixed and study.seconds not in (0.0, fixed):
        raise ConfigError(
            "seconds", study.seconds, f"plan.json has the steps of {fixed:g} seconds",
            f"Give {fixed!r} or 0, or another --output.",
        )  # fmt: skip
    times = [summary["train_seconds"] for part in summaries.values() for summary in part]
    seconds = fixed or study.seconds or (statistics.median(times) if times else 0.0)
    steps = {}
    for arm in arms(study):
        part, known = summaries.get(arm.name, ()), saved.get("seconds_steps", {}).get(arm.name, 0)
        if known and arm.name in summaries:
            steps[arm.name] = known
        elif part:
            speed = statistics.median(summary["samples_per_second"] for summary in part)
            steps[arm.name] = max(1, round(seconds * speed / (recipe.train.global_batch_size * arm.factor)))
    return steps, seconds


def _overrides(recipe: Recipe, arm: Arm, seed: int, folder: Path, num_steps: int, choice: Choice) -> dict[str, Any]:
    rate = choice.learning_rate
    train, optim, growth = recipe.train, recipe.optim, math.sqrt(arm.factor)
    values: dict[str, Any] = {
        "name": arm.name,
        "run_dir": str(folder),
        "seed": seed,
        "objective.name": arm.method,
        "train.num_steps": num_steps,
    }
    if choice.rho is not None:
        values["objective.rho"] = choice.rho
    if rate is not None or arm.factor > 1:
        values["optim.learning_rate"] = (rate or optim.learning_rate) * growth
    if arm.factor > 1:
        values |= {
            "train.global_batch_size": train.global_batch_size * arm.factor,
            "train.micro_batch_size": train.micro_batch_size or train.global_batch_size,
            "optim.temperature_learning_rate": optim.temperature_learning_rate * growth,
            "optim.warmup_steps": max(1, optim.warmup_steps // arm.factor),
        }
        if optim.cooldown_steps:
            values["optim.cooldown_steps"] = max(1, optim.cooldown_steps // arm.factor)
    return values
