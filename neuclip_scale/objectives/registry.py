"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from neuclip_scale.config import ConfigError, ObjectiveConfig
from neuclip_scale.normalizers import DatasetFeatures, IndividualTemperatures
from neuclip_scale.objectives.amorlip import AmorLIP
from neuclip_scale.objectives.base import Objective
from neuclip_scale.objectives.exact import Exact
from neuclip_scale.objectives.fastclip import FastCLIP, GammaSchedule, RGCLg, later_gamma_min
from neuclip_scale.objectives.individual import RGCL
from neuclip_scale.objectives.neuclip import NeuCLIP
from neuclip_scale.objectives.neuclip_queue import NeuCLIPQueue, default_size
from neuclip_scale.objectives.openclip import OpenCLIP
from neuclip_scale.objectives.siglip import SigLIP

DEFAULT_BATCH = 256
"""B where it is not known: the shortest horizon of a queue."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an objective must know besides its own section of the recipe."""

    embed_dim: int
    dataset_size: int | None = None
    """n, for objectives that keep something per sample or count epochs."""
    num_epochs: float | None = None
    """Length of the run, for schedules over epochs."""
    seed: int = 0
    global_batch_size: int | None = None
    """B, for what grows with it."""
    projected_widths: tuple[int, int] | None = None
    """`CLIP.projected_widths`, for a queue that maps its entries anew; None where no model is known."""
    encode_dataset: Callable[[], DatasetFeatures] | None = None
    """Features of all n pairs as the encoders stand (collective), for `exact`."""
    encode_flops: int = 0
    """FLOPs of `encode_dataset` on one rank."""

    def size_for(self, name: str) -> int:
        """n; raises `ConfigError` where it is not known."""
        if self.dataset_size is None:
            raise ConfigError(
                "dataset_size", None, f"{name} keeps an estimate per sample or counts epochs",
                "Give dataset_size=n (pairs in all).",
            )  # fmt: skip
        return self.dataset_size


def _fastclip(section: ObjectiveConfig, problem: Problem) -> Objective:
    """FastCLIP v0, v1, v3 and SogCLR: they differ in the factor tau, what learns it, and gamma."""
    return FastCLIP(
        section.name,
        dataset_size=problem.size_for(section.name),
        gamma=_gamma(section, problem),
        rho=section.rho if section.name == "fastclip-v3" else 0.0,
        eps=section.eps,
        tile_size=section.tile_size,
        unscaled=section.name == "fastclip-v0",
        constant_temperature=section.name in ("sogclr", "fastclip-v1"),
    )


def _rgcl(section: ObjectiveConfig, problem: Problem) -> Objective:
    """FastCLIP v2 and iSogCLR."""
    size = problem.size_for(section.name)
    temperatures = IndividualTemperatures(
        size,
        section.individual,
        initial=section.initial_temperature,
        minimum=section.temperature_min,
        maximum=section.temperature_max,
    )
    return RGCL(
        section.name,
        dataset_size=size,
        gamma=_gamma(section, problem),
        temperatures=temperatures,
        rho=section.rho,
        eps=section.eps,
        tile_size=section.tile_size,
    )


def _gamma(section: ObjectiveConfig, problem: Problem) -> GammaSchedule:
    epochs = problem.num_epochs or 0.0
    if section.gamma_min == 0 and not epochs:
        raise ConfigError(
            "objective.gamma_min", 0, "the rule that 0 stands for needs the number of epochs",
            "Give gamma_min itself.",
        )  # fmt: skip
    return GammaSchedule(
        minimum=section.gamma_min or later_gamma_min(epochs),
        decay_epochs=section.gamma_decay_epochs or epochs,
        constant=section.name in ("sogclr", "isogclr"),
    )


def _amorlip(section: ObjectiveConfig, problem: Problem) -> Objective:
    return AmorLIP(
        problem.embed_dim,
        section.amortized,
        dataset_size=problem.size_for(section.name),
        num_epochs=problem.num_epochs or 0.0,
        tile_size=section.tile_size,
        seed=problem.seed,
    )


def _neuclip(section: ObjectiveConfig, problem: Problem) -> Objective:
    return NeuCLIP(
        problem.embed_dim,
        section.npn,
        rho=section.rho,
        eps=section.eps,
        tile_size=section.tile_size,
        seed=problem.seed,
    )


def _neuclip_queue(section: ObjectiveConfig, problem: Problem) -> Objective:
    if section.queue.project_anew and problem.projected_widths is None:
        raise ConfigError(
            "objective.queue.project_anew", True, "a loss by itself does not see the towers' last maps",
            "Set it to false; `neuclip train` has what it needs.",
        )  # fmt: skip
    return NeuCLIPQueue(
        problem.embed_dim,
        section.queue,
        size=section.queue.size
        or default_size(problem.global_batch_size, problem.dataset_size, project_anew=section.queue.project_anew),
        global_batch_size=problem.global_batch_size or DEFAULT_BATCH,
        projected_widths=problem.projected_widths if section.queue.project_anew else None,
        rho=section.rho,
        eps=section.eps,
        tile_size=section.tile_size,
    )


def _exact(section: ObjectiveConfig, problem: Problem) -> Objective:
    if problem.encode_dataset is None:
        raise ConfigError(
            "encode_dataset", None, "exact normalizers need features of the whole data set at every step",
            "Give encode_dataset, a function that returns DatasetFeatures; `neuclip train` does.",
        )  # fmt: skip
    return Exact(
        problem.encode_dataset,
        encode_flops=problem.encode_flops,
        dataset_size=problem.size_for(section.name),
        refresh_every=section.exact_refresh_every,
        rho=section.rho,
        eps=section.eps,
        tile_size=section.tile_size,
    )


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, Problem], Objective]] = {
    "openclip": lambda section, problem: OpenCLIP(tile_size=section.tile_size),
    "siglip": lambda section, problem: SigLIP(tile_size=section.tile_size),
    "sogclr": _fastclip,
    "isogclr": _rgcl,
    "fastclip-v0": _fastclip,
    "fastclip-v1": _fastclip,
    "fastclip-v2": _rgcl,
    "fastclip-v3": _fastclip,
    "rgcl-g": lambda section, problem: RGCLg(rho=section.rho, eps=section.eps, tile_size=section.tile_size),
    "amorlip": _amorlip,
    "neuclip": _neuclip,
    "neuclip-queue": _neuclip_queue,
    "exact": _exact,
}


_NEED_ALL_PAIRS = {
    "neuclip-queue": "compares all pairs of a batch with each rank's part of its queue, so each needs them all",
    "exact": "holds the features of the whole data set on every rank, beside which a batch's are nothing",
}


def create_objective(section: ObjectiveConfig, problem: Problem) -> Objective:
    """Build the objective a recipe names; raises `ConfigError` for unknown names or a missing data set size."""
    if section.name not in OBJECTIVES:
        raise ConfigError("objective.name", section.name, "no such objective", f"Choose from {', '.join(OBJECTIVES)}.")
    if section.exchange == "ring" and section.name in _NEED_ALL_PAIRS:
        reason = f"{section.name} {_NEED_ALL_PAIRS[section.name]}"
        raise ConfigError("objective.exchange", "ring", reason, "Use gather, or another objective.name (neuclip).")
    return OBJECTIVES[section.name](section, problem)
