"""The estimators that a study watches: objectives by the options they differ in."""

from __future__ import annotations

from typing import Any

from neuclip_scale.config import ConfigError, ObjectiveConfig, parse

Options = dict[str, Any]

SWEEPS: dict[str, list[Options]] = {
    "updates": [{"npn": {"updates_per_step": value}} for value in (1, 3, 30)],
    "restarts": [{"npn": {"restart_every": value}} for value in (0, 25, 500)],
    "rate": [{"npn": {"learning_rate": value}} for value in (0.001, 0.003, 0.03, 0.1)],
    "prototypes": [{"npn": {"num_prototypes": value}} for value in (256, 4096)],
    "source": [{"npn": {"prototype_source": "batch"}}],
    "own": [
        {"npn": {"exclude_own": False}},
        {"npn": {"exclude_own": False, "prototype_source": "batch"}},
    ],
    "accumulator": [{"npn": {"reset_accumulator": True}}],
    "queue": [{"queue": {"size": value}} for value in (256, 1024, 4096)] + [{"queue": {"join_batch": False}}],
    "mix": [{"queue": {"batch_weight": value}} for value in (0.1, 0.5)],
}
"""Named lists of changes, each to one estimator of `core`."""

_NAMES = {"npn": "neuclip", "queue": "neuclip-queue"}


def core(num_prototypes: int, restart_every: int) -> dict[str, Options]:
    """One estimator of each kind, with published settings where there are any."""
    return {
        "mini-batch": {"name": "rgcl-g"},
        "u table": {"name": "fastclip-v3", "gamma_min": 0.2},
        "u table, later rule": {"name": "fastclip-v3", "gamma_min": 0.0},
        "amortized network": {"name": "amorlip"},
        "NPN": {"name": "neuclip", "npn": {"num_prototypes": num_prototypes, "restart_every": restart_every}},
        "queue": {"name": "neuclip-queue"},
    }


def estimators(sweeps: tuple[str, ...], num_prototypes: int, restart_every: int) -> dict[str, Options]:
    """`core` and what the named sweeps add, by a label that says the change; raises `ConfigError` for a name."""
    chosen = core(num_prototypes, restart_every)
    for sweep in sweeps:
        if sweep not in SWEEPS:
            raise ConfigError("sweeps", sweep, "no such sweep", f"Choose from {', '.join(SWEEPS)}.")
        for change in SWEEPS[sweep]:
            ((section, values),) = change.items()
            base = chosen["NPN" if section == "npn" else "queue"]
            options = {"name": _NAMES[section], section: {**base.get(section, {}), **values}}
            kind = "NPN" if section == "npn" else "queue"
            chosen[f"{kind}, {', '.join(f'{key} {value}' for key, value in values.items())}"] = options
    return chosen


def objective_section(options: Options, base: ObjectiveConfig) -> ObjectiveConfig:
    """The objective's section of a recipe: `options` over `base`'s rho, eps and tile size."""
    common = {"rho": base.rho, "eps": base.eps, "tile_size": base.tile_size}
    return parse(ObjectiveConfig, {**common, **options})
