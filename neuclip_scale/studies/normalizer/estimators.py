"""The estimators that a study watches: objectives by the options they differ in."""

from __future__ import annotations

from typing import Any

from neuclip_scale.config import ConfigError, ObjectiveConfig, parse

Options = dict[str, Any]

SWEEPS: dict[str, dict[str, Options]] = {
    "updates": {f"NPN, T_u {value}": {"npn": {"updates_per_step": value}} for value in (1, 3, 30)},
    "restarts": {
        "NPN, no restart": {"npn": {"restart_every": 0}},
        **{f"NPN, T_r {value}": {"npn": {"restart_every": value}} for value in (25, 500)},
    },
    "rate": {f"NPN, lr {value}": {"npn": {"learning_rate": value}} for value in (0.001, 0.003, 0.03, 0.1)},
    "prototypes": {f"NPN, m {value}": {"npn": {"num_prototypes": value}} for value in (256, 4096)},
    "source": {"NPN, from batch": {"npn": {"prototype_source": "batch"}}},
    "own": {
        "NPN, own kept": {"npn": {"exclude_own": False}},
        "NPN, own kept, from batch": {"npn": {"exclude_own": False, "prototype_source": "batch"}},
    },
    "accumulator": {"NPN, reset": {"npn": {"reset_accumulator": True}}},
    "grid": {
        f"NPN, T_u {updates}, lr {rate}": {"npn": {"updates_per_step": updates, "learning_rate": rate}}
        for updates in (1, 3)
        for rate in (0.001, 0.003)
    },
    "queue": {
        **{f"plain queue, M {value}": {"queue": {"size": value, "forget": False}} for value in (1024, 8192)},
        **{f"queue, M {value}": {"queue": {"size": value}} for value in (1024, 8192)},
        "queue without batch": {"queue": {"join_batch": False}},
        "queue, projected anew": {"queue": {"project_anew": True}},
    },
    "mix": {f"queue, w {value}": {"queue": {"batch_weight": value}} for value in (0.1, 0.5)},
}
"""By name: labels and the changes they stand for, each to the NPN or the queue of `core`."""

_BASES = {"npn": "NPN", "queue": "queue"}


def core(num_prototypes: int, restart_every: int) -> dict[str, Options]:
    """One estimator of each kind, with published settings where there are any."""
    return {
        "mini-batch": {"name": "rgcl-g"},
        "u table": {"name": "fastclip-v3", "gamma_min": 0.2},
        "u table, later rule": {"name": "fastclip-v3", "gamma_min": 0.0},
        "amortized network": {"name": "amorlip"},
        "NPN": {"name": "neuclip", "npn": {"num_prototypes": num_prototypes, "restart_every": restart_every}},
        "queue": {"name": "neuclip-queue", "queue": {"batch_weight": 0.0}},
    }


def estimators(sweeps: tuple[str, ...], num_prototypes: int, restart_every: int) -> dict[str, Options]:
    """`core` and what the named sweeps add, by label; raises `ConfigError` for a name."""
    chosen = core(num_prototypes, restart_every)
    for sweep in sweeps:
        if sweep not in SWEEPS:
            raise ConfigError("sweeps", sweep, "no such sweep", f"Choose from {', '.join(SWEEPS)}.")
        for label, change in SWEEPS[sweep].items():
            ((section, values),) = change.items()
            base = chosen[_BASES[section]]
            chosen[label] = {"name": base["name"], section: {**base.get(section, {}), **values}}
    return chosen


def only(chosen: dict[str, Options], labels: tuple[str, ...]) -> dict[str, Options]:
    """Those of `labels` and the mini-batch, what the others are compared with; all if there is no label.

    Raises `ConfigError` for a label that is not among the chosen.
    """
    for label in labels:
        if label not in chosen:
            raise ConfigError(
                "estimators", label, "no such estimator", f"Choose from {'; '.join(chosen)}, or add a sweep."
            )
    return {label: chosen[label] for label in chosen if not labels or label in (*labels, "mini-batch")}


def objective_section(options: Options, base: ObjectiveConfig) -> ObjectiveConfig:
    """The objective's section of a recipe: `options` over `base`'s rho, eps and tile size."""
    common = {"rho": base.rho, "eps": base.eps, "tile_size": base.tile_size}
    return parse(ObjectiveConfig, {**common, **options})
