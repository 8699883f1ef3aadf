"""What `neuclip reproduce` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neuclip_scale.config import ConfigError
from neuclip_scale.reproduce.experiment import Experiment
from neuclip_scale.reproduce.places import Places


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
        source = self.experiment.list
        if source.kind == "file" and not self.list:
            raise ConfigError("--list", "", "this experiment's list cannot be fetched", f"Give {source.how}.")
        if source.kind == "demo" and self.list:
            raise ConfigError("--list", self.list, "the demo makes its own list", "Leave it out.")
        for name, values in (("--methods", self.experiment.methods), ("--seeds", self.experiment.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(name, list(values), "nothing, or one twice", "Give each once, at least one.")
        if self.experiment.jobs < 1:
            raise ConfigError("--jobs", self.experiment.jobs, "there must be at least one", "Give 1 or more.")
