"""What an audit is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neuclip_scale.audit.errors import UsageError
from neuclip_scale.audit.mattering import Claim
from neuclip_scale.config import check_launcher
from neuclip_scale.queries.engines import EngineOptions


@dataclass(frozen=True)
class Thresholds:
    """What is no discrepancy yet, as shares from 0 to 1."""

    max_missing: float = 0.0
    """Share of the wanted samples whose absence is no discrepancy."""
    max_orphaned: float = 0.0
    """The same for samples that are not on the list."""
    max_duplicated: float = 0.0
    """The same for samples that are there more than once."""
    max_corrupt: float = 0.0
    """The same for samples that cannot be used."""
    max_changed: float = 0.0
    """Share of the checked samples whose content may have changed."""
    min_jaccard: float = 1.0
    """Of two downloads, below which they count as different."""

    def check(self) -> None:
        """Raise `UsageError` for a value that is no share."""
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0 or math.isnan(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a share from 0 to 1.")


@dataclass(frozen=True)
class EmpiricalOptions:
    """Training at small scale on what two downloads hold."""

    recipe: str = "demo"
    """Recipe that all arms share; every one sees as many samples."""
    method: str = "openclip"
    """Objective."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm."""
    drops: int = 3
    """Random drops for each of the two downloads and for what they share."""
    max_pairs: int = 0
    """Pairs drawn from both downloads together, for a check that is smaller than they are; 0 takes all."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE"), tyro.conf.UseAppendAction] = ()
    """Overrides of the recipe; `evaluation.data` among them, unless the recipe has it."""
    jobs: int = 1
    """Runs trained at a time."""
    launcher: str = ""
    """Words before `neuclip`, such as "torchrun --no-python --nproc-per-node 8"."""


@dataclass(frozen=True)
class AuditRequest:
    """One audit; every part but the list, a download and the output may be left out."""

    manifest: str
    downloads: tuple[str, ...]
    output: Path
    runs: tuple[Path, ...] = ()
    subset_file: Path | None = None
    identity: Literal["auto", "uid", "url"] = "auto"
    deep: bool = False
    samples_seen: int | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    claim: Claim = field(default_factory=Claim)
    empirical: EmpiricalOptions | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    num_workers: int = 1

    def check(self) -> None:
        """Raise `UsageError` for arguments that contradict each other, `ConfigError` for a launcher not there."""
        self.thresholds.check()
        self.engine.check()
        if not self.downloads:
            raise UsageError("--download: none given. Give the folder of a download at least once.")
        if self.num_workers < 1:
            raise UsageError(f"-j {self.num_workers}: give a number of processes, or 0 for every core.")
        if self.subset_file and not self.subset_file.is_file():
            raise UsageError(f"--subset-file {self.subset_file}: there is no such file.")
        self.claim.check()
        pairs = len(self.downloads) > 1
        if not pairs and (self.claim.points is not None or self.empirical):
            raise UsageError("--gain, --empirical: compare two downloads. Give --download twice.")
        if self.empirical and self.identity == "url":
            raise UsageError("--empirical: needs uids, and --identity url has none.")
        if self.empirical:
            check_launcher(self.empirical.launcher)
        if self.samples_seen is not None and self.samples_seen < 1:
            raise UsageError(f"--samples-seen {self.samples_seen}: give a positive number.")
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"--output {self.output}: is not a folder. Give a new one, or one of an earlier audit.")
