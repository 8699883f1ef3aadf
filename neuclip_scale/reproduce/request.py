"""What `neuclip reproduce` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from neuclip_scale.config import ConfigError
from neuclip_scale.reproduce.experiment import Experiment
from neuclip_scale.reproduce.places import Places
from neuclip_scale.subset.filters import FilterName


@dataclass(frozen=True, kw_only=True)
class Request:
    """An experiment, and what is special to this place."""

    experiment: Experiment
    output: Path
    list: str = ""
    """The published list; empty where the experiment fetches or makes it."""
    demo_data: Path = Path("demo-data")
    """Folder of `neuclip demo-data`, made where it is not there."""
    evaluation: Path | None = None
    """Folder with DataComp's sets; None fetches them from the hub."""
    launcher: str = ""
    """What starts a training on this machine, as torchrun with its arguments."""
    num_workers: int = 1
    """Processes that read and write shards."""
    overrides: tuple[str, ...] = ()
    """section.field=value of all runs, after the experiment's."""
    price: float = 0.0
    """Of a device for an hour."""

    @property
    def places(self) -> Places:
        """Where everything lies."""
        return Places(self.output)

    @property
    def labels(self) -> dict[str, tuple[str, int]]:
        """Run -> method and seed, seed by seed, so that what is cut off has whole seeds."""
        experiment = self.experiment
        return {f"{m}-seed{seed}": (m, seed) for seed in experiment.seeds for m in experiment.methods}

    @property
    def sets(self) -> Path:
        """Folder of the evaluation sets."""
        if self.experiment.suite == "sets":
            return self.evaluation or self.demo_data / "eval"
        return self.evaluation or self.output / "sets"

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be."""
        experiment = self.experiment
        source = experiment.list
        if source.kind == "file" and not self.list:
            raise ConfigError("--list", "", "this experiment's list cannot be fetched", f"Give {source.how}.")
        if source.kind == "demo" and self.list:
            raise ConfigError("--list", self.list, "the demo makes its own list", "Leave it out.")
        if self.evaluation and not self.evaluation.is_dir():
            raise ConfigError("--evaluation", str(self.evaluation), "no such folder", "Give that of the sets.")
        for name, values in (("--methods", experiment.methods), ("--seeds", experiment.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(name, list(values), "nothing, or one twice", "Give each once, at least one.")
        least = {"--jobs": (experiment.jobs, 1), "--nodes": (experiment.nodes, 1), "-j": (self.num_workers, 1)}
        least |= {"--gpus-per-node": (experiment.gpus_per_node, 0), "--seeds": (min(experiment.seeds), 0)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ConfigError(name, value, "too small", f"Give {smallest} or more.")
        if self.price < 0:
            raise ConfigError("--price", self.price, "below zero", "Give a price, or leave it out.")
        if experiment.jobs > 1 and experiment.gpus_per_node:
            raise ConfigError("--jobs", experiment.jobs, "trainings would share GPUs", "Leave it out.")
        for text in self.overrides:
            name = text.partition("=")[0].strip()
            if name in OWNED:
                raise ConfigError("--set", text, "the stages set this themselves", OWNED[name])
        _check_filter(experiment)


OWNED = {
    "seed": "Use --seeds.",
    "objective.name": "Use --methods.",
    "run_dir": "Use --output.",
    "data.train": "Use --list.",
    "data.require_audit": "Leave it out.",
    "evaluation.data": "Use --evaluation.",
}
"""What --set may not change, and what to do instead."""


def _check_filter(experiment: Experiment) -> None:
    known = get_args(FilterName)
    if experiment.filter not in known:
        told = f"Choose from {', '.join(known)}."
        raise ConfigError("--filter", experiment.filter, "there is no such filter", told)
    if experiment.filter == "no_filter" and experiment.filter_options:
        told = "Leave them out, or give --filter."
        raise ConfigError("--filter-options", " ".join(experiment.filter_options), "no filter to take them", told)
