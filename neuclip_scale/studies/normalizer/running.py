"""All trajectories of a study, one after the other; what is finished is kept, so that a killed study goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.data.shards import expand_shards
from neuclip_scale.files import write_json
from neuclip_scale.studies.normalizer.estimators import Options, estimators, only
from neuclip_scale.studies.normalizer.gradients import GradientProbe
from neuclip_scale.studies.normalizer.settings import NormalizerStudy
from neuclip_scale.studies.normalizer.watching import Trajectory, watch

NOT_DECIDING = ("output", "json", "threads", "batches", "shards", "seeds")
"""Settings that do not change what one trajectory gives."""

Report = Callable[[str], None]


def run_study(study: NormalizerStudy, report: Report) -> dict[str, Any]:
    """Run what is missing; returns {"settings", "rows", "gradients", "versions"}. Raises `ConfigError`."""
    if study.threads:
        torch.set_num_threads(study.threads)
    chosen = only(estimators(study.sweeps, study.prototypes, study.restart_every), study.estimators)
    rows: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    planned = list(_trajectories(study))
    for number, (name, trajectory) in enumerate(planned, start=1):
        path = study.output / "trajectories" / f"{name}.json"
        part = _finished(path, study)
        if part is None:
            report(f"{number}/{len(planned)} {name}: training with {len(chosen)} estimators watching")
            part = _run(study, trajectory, chosen)
            write_json(path, part)
        else:
            report(f"{number}/{len(planned)} {name}: kept from before")
        rows += part["rows"]
        gradients += part["gradients"]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(study).items()}
    return {"settings": settings, "torch": str(torch.__version__), "rows": rows, "gradients": gradients}


def _trajectories(study: NormalizerStudy) -> Iterator[tuple[str, Trajectory]]:
    data = study.data or load_recipe(study.recipe).data.train
    shards = expand_shards(data)
    for count in study.shards:
        if not 0 <= count <= len(shards):
            raise ConfigError("shards", count, f"{data} has {len(shards)}", "Give 0 for all, or at most so many.")
        for batch in study.batches:
            for seed in study.seeds:
                used = shards[: count or len(shards)]
                trajectory = Trajectory(
                    recipe=study.recipe,
                    data="::".join(used),
                    driver=study.driver,
                    batch=batch,
                    seed=seed,
                    steps=study.steps,
                    measure_every=study.measure_every,
                )
                yield f"b{batch}-shards{len(used)}-seed{seed}", trajectory


def _run(study: NormalizerStudy, trajectory: Trajectory, chosen: dict[str, Options]) -> dict[str, Any]:
    probe = None
    if study.gradient_batches:
        probe = GradientProbe(num_batches=study.gradient_batches, batch=trajectory.batch, seed=trajectory.seed)
    rows, gradients = watch(trajectory, chosen, probe)
    where = {"batch": trajectory.batch, "n": rows[0]["n"], "seed": trajectory.seed, "step": trajectory.steps}
    return {"fingerprint": _fingerprint(study), "rows": rows, "gradients": [where | row for row in gradients]}


def _finished(path: Path, study: NormalizerStudy) -> dict[str, Any] | None:
    """A trajectory of an earlier run with the same settings; raises `ConfigError` if the settings were others."""
    if not path.is_file():
        return None
    part: dict[str, Any] = json.loads(path.read_bytes())
    if part["fingerprint"] != _fingerprint(study):
        raise ConfigError(
            "output", str(study.output), f"{path.name} was made with other settings", "Give another folder."
        )
    return part


def _fingerprint(study: NormalizerStudy) -> dict[str, Any]:
    kept = {key: value for key, value in dataclasses.asdict(study).items() if key not in NOT_DECIDING}
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]
