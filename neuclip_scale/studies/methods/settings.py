"""What `neuclip study methods` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from neuclip_scale.config import ObjectiveName

Budget = Literal["samples", "seconds"]


@dataclass(frozen=True, kw_only=True)
class MethodsStudy:
    """Train each method with each seed at equal samples and at equal wall-clock, beside OpenCLIP and SigLIP with a
    larger batch, and compare the runs. The larger batches are matched in pairs seen; hardware FLOPs are reported."""

    output: Path
    """Folder for the runs and the report. Finished runs in it are kept, a killed one goes on where it stopped, and
    further seeds train by the steps and seconds of its plan.json."""
    recipe: str = "demo"
    """Recipe that all runs share."""
    data: str = ""
    """Training shards; empty takes the recipe's."""
    methods: tuple[str, ...] = tuple(name for name in get_args(ObjectiveName) if name != "exact")
    """Objectives; `exact` encodes the whole data set at every step and is left out unless it is named."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; fewer than three give no interval worth the name."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates of the encoders to choose from: before the budgets every arm trains with each of them and
    `tuning_seed`, and goes on with the one whose held-out scores have the best mean; one that diverges is the
    worst. Empty: the recipe's for all."""
    rhos: tuple[float, ...] = ()
    """Weights of the temperature's term to choose from, together with the learning rate, for the arms that have one."""
    tuning_seed: int = 1000
    """Seed of the runs that choose; none of `seeds`, so that no arm is reported on what chose its settings."""
    tuning_steps: int = 0
    """Steps of these runs, a fraction of them for a larger batch; 0 takes those of equal samples."""
    budgets: tuple[Budget, ...] = ("samples", "seconds")
    """samples: every run sees as many pairs. seconds: every run trains as long, at the speed it had in the first."""
    seconds: float = 0.0
    """Wall-clock of the second budget; 0 takes plan.json's, and at first the median of the runs of the first."""
    larger: tuple[str, ...] = ("openclip", "siglip")
    """Methods that also train with a batch `larger_factor` times as large: as many pairs in fewer steps,
    with more hardware FLOPs, as gradient caching encodes all micro-batches but one twice (x4, demo model: 1.25)."""
    larger_factor: int = 4
    """Learning rates grow with its square root; the encoders' micro-batch stays the recipe's batch."""
    variants: tuple[str, ...] = ()
    """Further arms, `LABEL:METHOD:section.field=value,...`: a method with other options, a learning rate of its own."""
    overrides: tuple[str, ...] = ()
    """`section.field=value` for every run."""
    jobs: int = 1
    """Runs trained at a time on this machine, each with an equal part of the CPU's threads."""
    launcher: str = ""
    """Words before `neuclip`, such as `torchrun --no-python --nproc-per-node 8`."""
    json: Path | None = None
    """Also write the comparison to this file."""
