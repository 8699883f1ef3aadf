"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from neuclip_scale.config import ConfigError, ObjectiveConfig
from neuclip_scale.objectives.base import Objective
from neuclip_scale.objectives.fastclip import FastCLIPv3
from neuclip_scale.objectives.neuclip import NeuCLIP
from neuclip_scale.objectives.openclip import OpenCLIP


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an objective must know besides its own section of the recipe."""

    embed_dim: int
    dataset_size: int | None = None
    """n, for objectives that keep something per sample."""
    num_epochs: float | None = None
    """Length of the run, for schedules over epochs."""
    seed: int = 0


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, Problem], Objective]] = {
    "openclip": lambda section, problem: OpenCLIP(tile_size=section.tile_size),
    "fastclip-v3": lambda section, problem: FastCLIPv3(
        dataset_size=_dataset_size(section, problem),
        rho=section.rho,
        eps=section.eps,
        gamma_min=section.gamma_min,
        gamma_decay_epochs=section.gamma_decay_epochs or problem.num_epochs or 0,
        tile_size=section.tile_size,
    ),
    "neuclip": lambda section, problem: NeuCLIP(
        problem.embed_dim,
        section.npn,
        rho=section.rho,
        eps=section.eps,
        tile_size=section.tile_size,
        seed=problem.seed,
    ),
}


def create_objective(section: ObjectiveConfig, problem: Problem) -> Objective:
    """Build the objective a recipe names; raises `ConfigError` for unknown names or a missing data set size."""
    if section.name not in OBJECTIVES:
        raise ConfigError("objective.name", section.name, "no such objective", f"Choose from {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[section.name](section, problem)


def _dataset_size(section: ObjectiveConfig, problem: Problem) -> int:
    if problem.dataset_size is None:
        raise ConfigError(
            "dataset_size", None, f"{section.name} keeps an estimate per sample", "Give dataset_size=n (pairs in all)."
        )
    return problem.dataset_size
