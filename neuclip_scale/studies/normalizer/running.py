"""All trajectories of a study, one after the other; what is finished is kept, so that a killed study goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from neuclip_scale.config import ConfigError, load_recipe, recipe_fields
from neuclip_scale.data.run_manifest import run_manifest
from neuclip_scale.data.shards import expand_shards, split_sources
from neuclip_scale.files import write_json
from neuclip_scale.studies.normalizer.estimators import Options, estimators, only
from neuclip_scale.studies.normalizer.gradients import GradientProbe
from neuclip_scale.studies.normalizer.settings import NormalizerStudy
from neuclip_scale.studies.normalizer.watching import Trajectory, overrides, watch
from neuclip_scale.untrusted_text import listed

PLACES = ("name", "run_dir", "data.train")
"""Fields of a recipe that say where and not what; the data are known by their manifest."""

_OWN_TEMPERATURES = "its temperatures are each pair's own, and the estimators watch at the one of the model"
_UNWATCHABLE = {
    "siglip": "it has no normalizer, so no step of it is held against the truth",
    "isogclr": _OWN_TEMPERATURES,
    "fastclip-v2": _OWN_TEMPERATURES,
}

Report = Callable[[str], None]


def run_study(study: NormalizerStudy, report: Report) -> dict[str, Any]:
    """Run what is missing; returns {"settings", "torch", "threads", "rows", "gradients"}. Raises `ConfigError`."""
    _check(study)
    if study.threads:
        torch.set_num_threads(study.threads)
    chosen = only(estimators(study.sweeps, study.prototypes, study.restart_every), study.estimators)
    parts: list[dict[str, Any]] = []
    planned = list(_trajectories(study))
    _check_apart([name for name, _ in planned])
    for number, (name, trajectory) in enumerate(planned, start=1):
        path = study.output / "trajectories" / f"{name}.json"
        fingerprint = _fingerprint(study, trajectory, chosen)
        part = _finished(path, fingerprint)
        if part is None:
            report(f"{number}/{len(planned)} {name}: training with {len(chosen)} estimators watching")
            part = {"fingerprint": fingerprint, "torch": str(torch.__version__)} | _run(study, trajectory, chosen)
            write_json(path, part)
        else:
            report(f"{number}/{len(planned)} {name}: kept from before")
        parts.append(part)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(study).items()}
    return {
        "settings": settings,
        "torch": ", ".join(sorted({part["torch"] for part in parts})),
        "threads": torch.get_num_threads(),
        "rows": [row for part in parts for row in part["rows"]],
        "gradients": [row for part in parts for row in part["gradients"]],
    }


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


def _check_apart(names: list[str]) -> None:
    """Refuse a trajectory that is planned twice, which would count as two."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                "batches, shards or seeds", name, "this trajectory is asked for twice",
                "Give each value once; for shards, 0 is all of them.",
            )  # fmt: skip


def _run(study: NormalizerStudy, trajectory: Trajectory, chosen: dict[str, Options]) -> dict[str, Any]:
    probe = None
    if study.gradient_batches:
        probe = GradientProbe(num_batches=study.gradient_batches, batch=trajectory.batch, seed=trajectory.seed)
    rows, gradients = watch(trajectory, chosen, probe)
    where = {"batch": trajectory.batch, "n": rows[0]["n"], "seed": trajectory.seed, "step": trajectory.steps}
    return {"rows": rows, "gradients": [where | row for row in gradients]}


def _fingerprint(study: NormalizerStudy, trajectory: Trajectory, chosen: dict[str, Options]) -> dict[str, Any]:
    """All that decides the rows of a trajectory, as name -> JSON value: contents, not the places they lie at."""
    recipe = load_recipe(trajectory.recipe, overrides(trajectory, folder=""))
    shards = len(split_sources(trajectory.data))
    decides = {
        **{f"recipe.{name}": value for name, value in recipe_fields(recipe).items() if name not in PLACES},
        "data": run_manifest(study.output / "manifests" / f"shards{shards}.json", recipe.data).fingerprint,
        "estimators": chosen,
        "gradient_batches": study.gradient_batches,
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(decides))  # type: ignore[no-any-return]


def _finished(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """A trajectory of an earlier run with the same settings; raises `ConfigError` if the settings were others."""
    if not path.is_file():
        return None
    part: dict[str, Any] = json.loads(path.read_bytes())
    before = part["fingerprint"]
    others = sorted(name for name in {*before, *fingerprint} if before.get(name) != fingerprint.get(name))
    if others:
        names = listed(others, most=6)
        raise ConfigError(
            "output", str(path.parents[1]), f"{path.name} was made with other settings ({names})",
            "Give the same again, or another folder.",
        )  # fmt: skip
    return part


def _check(study: NormalizerStudy) -> None:
    """Refuse, before any training, what would give no rows."""
    if study.driver in _UNWATCHABLE:
        raise ConfigError("driver", study.driver, _UNWATCHABLE[study.driver], "Take another, such as openclip.")
    for name, values in (("batches", study.batches), ("shards", study.shards), ("seeds", study.seeds)):
        if not values:
            raise ConfigError(name, [], "no trajectory would be trained", "Give one at least, or leave the option out.")
    for name, value, least in (("steps", study.steps, 1), ("measure_every", study.measure_every, 1),
                               ("threads", study.threads, 0)):  # fmt: skip
        if value < least:
            raise ConfigError(name, value, "too small", f"Give {least} or more.")
