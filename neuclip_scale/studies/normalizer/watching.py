"""One training trajectory that many estimators watch without touching it."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from neuclip_scale.config import load_recipe
from neuclip_scale.normalizers.exact import error_statistics
from neuclip_scale.objectives import Objective, ObjectiveOutput, create_objective
from neuclip_scale.objectives.registry import Problem
from neuclip_scale.similarity import BatchShape, PairFeatures
from neuclip_scale.studies.normalizer.estimators import Options, objective_section
from neuclip_scale.trainer import Trainer


class StudyStoppedError(RuntimeError):
    """A signal ended a trajectory, which is not kept."""


@dataclass
class Watcher:
    """An estimator beside the training, and what it took."""

    label: str
    options: Options
    objective: Objective
    seconds: float = 0.0
    calls: int = 0
    output: ObjectiveOutput | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)


class Watched(Objective):
    """The driver's objective; passes every batch on to the watchers."""

    def __init__(self, driver: Objective, watchers: list[Watcher]) -> None:
        super().__init__(driver.tile_size)
        self.driver, self.watchers = driver, watchers

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        """See `Objective.compute`; what the watchers compute is kept by them."""
        for watcher in self.watchers:
            watcher.objective.train(self.training)
            began = _now(scale)
            watcher.output = watcher.objective(pairs, scale, world_index)
            if watcher.calls:  # the first call starts NPN and queue and loads kernels
                watcher.seconds += _now(scale) - began
            watcher.calls += 1
        self.driver.train(self.training)
        return self.driver(pairs, scale, world_index, bias)

    @property
    def needs_projections(self) -> bool:
        """If any watcher does."""
        return any(each.needs_projections for each in (self.driver, *(watcher.objective for watcher in self.watchers)))

    def flops(self, shape: BatchShape) -> int:
        """Those of the training; watching is no part of it."""
        return self.driver.flops(shape)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What fixes a trajectory."""

    recipe: str
    data: str
    driver: str
    """Objective that trains the model."""
    batch: int
    seed: int
    steps: int
    measure_every: int


class Probe(Protocol):
    """What is measured once the training is done."""

    def check(self, num_samples: int) -> None:
        """Before the training: raise `ConfigError` where it could not be."""

    def __call__(self, trainer: Trainer, watchers: list[Watcher]) -> list[dict[str, Any]]:
        """Its rows."""


def watch(
    trajectory: Trajectory, chosen: dict[str, Options], probe: Probe | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train along `trajectory`; returns the rows of errors, and those of `probe`, called when training is done."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_recipe(trajectory.recipe, overrides(trajectory, folder)))
        if probe:
            probe.check(trainer.manifest.num_samples)
        problem = Problem(
            embed_dim=trainer.engine.module.embed_dim,
            dataset_size=trainer.manifest.num_samples,
            num_epochs=trajectory.steps * trajectory.batch / trainer.manifest.num_samples,
            seed=trajectory.seed,
            global_batch_size=trajectory.batch,
            projected_widths=trainer.engine.module.projected_widths,
        )
        base = trainer.config.objective
        watchers = [
            Watcher(label, options, create_objective(objective_section(options, base), problem).to(trainer.device))
            for label, options in chosen.items()
        ]
        trainer.objective = Watched(trainer.objective, watchers)
        trainer.engine.module.show_projections(trainer.objective.needs_projections)
        trainer.monitor.on_exact = lambda exact, output: _measure(exact, watchers, trainer, trajectory)
        if trainer.fit()["status"] != "finished":
            raise StudyStoppedError("stopped by a signal. Run the same command again: finished trajectories are kept.")
        rows = [row for watcher in watchers for row in _with_cost(watcher)]
        return rows, probe(trainer, watchers) if probe else []


def overrides(trajectory: Trajectory, folder: str) -> dict[str, Any]:
    """What a trajectory changes in its recipe, to train in `folder`."""
    return {
        "data.train": trajectory.data,
        "run_dir": str(Path(folder) / "run"),
        "evaluation.data": "",
        "seed": trajectory.seed,
        "objective.name": trajectory.driver,
        "train.num_steps": trajectory.steps,
        "train.global_batch_size": trajectory.batch,
        "train.log_every_steps": max(1, trajectory.steps // 4),
        "checkpoint.every_steps": 0,
        "evaluation.normalizer_every_steps": trajectory.measure_every,
        "evaluation.normalizer_reference": 0,
    }


def _measure(exact: Tensor, watchers: list[Watcher], trainer: Trainer, trajectory: Trajectory) -> None:
    step = trainer.run_state.launched + 1
    for watcher in watchers:
        assert watcher.output is not None
        assert watcher.output.normalizers is not None
        row = {
            "estimator": watcher.label,
            "objective": watcher.options["name"],
            **{
                key: value for part in watcher.options.values() if isinstance(part, dict) for key, value in part.items()
            },
            "batch": trajectory.batch,
            "n": trainer.manifest.num_samples,
            "m": _width(watcher.objective),
            "seed": trajectory.seed,
            "step": step,
            "tau": float(1 / trainer.engine.module.logit_scale.exp()),
            **error_statistics(watcher.output.normalizers.estimates, exact),
        }
        watcher.rows.append(row)


def _now(tensor: Tensor) -> float:
    """Seconds; on a GPU, when it has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _with_cost(watcher: Watcher) -> list[dict[str, Any]]:
    seconds = watcher.seconds / max(1, watcher.calls - 1)
    return [{**row, "seconds_per_step": seconds} for row in watcher.rows]


def _changes(options: Options) -> dict[str, Any]:
    """Fields of the estimator's own section, such as updates_per_step."""
    return {key: value for part in options.values() if isinstance(part, dict) for key, value in part.items()}


def _width(objective: Objective) -> int:
    """Embeddings that the estimator of each side holds."""
    npn, queue = getattr(objective, "image_npn", None), getattr(objective, "queue", None)
    if npn is not None:
        return int(npn.num_prototypes)
    return int(queue.size) if queue is not None else 0


def fork(objective: Objective) -> Objective:
    """A copy that can take a step without moving the original."""
    return copy.deepcopy(objective)


@torch.no_grad()
def estimates(output: ObjectiveOutput) -> Tensor:
    """What an objective took log(eps + g) to be, [b, 2]."""
    assert output.normalizers is not None
    return output.normalizers.estimates
