"""What an audit is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from neuclip_scale.audit.engines import EngineOptions
from neuclip_scale.audit.errors import UsageError


@dataclass(frozen=True)
class Thresholds:
    """What is no discrepancy yet: shares of the listed samples, from 0 to 1."""

    max_missing: float = 0.0
    max_orphaned: float = 0.0
    max_duplicated: float = 0.0
    max_corrupt: float = 0.0
    max_changed: float = 0.0
    """Of the samples whose content could be checked."""
    min_jaccard: float = 1.0
    """Of each pair of downloads."""

    def check(self) -> None:
        """Raise `UsageError` for a value that is no share."""
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0 or math.isnan(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a share from 0 to 1.")


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
    engine: EngineOptions = field(default_factory=EngineOptions)
    num_workers: int = 1

    def check(self) -> None:
        """Raise `UsageError` for arguments that contradict each other."""
        self.thresholds.check()
        self.engine.check()
        if not self.downloads:
            raise UsageError("--download: none given. Give the folder of a download at least once.")
        if self.samples_seen is not None and self.samples_seen < 1:
            raise UsageError(f"--samples-seen {self.samples_seen}: give a positive number.")
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"--output {self.output}: is not a folder. Give a new one, or one of an earlier audit.")
