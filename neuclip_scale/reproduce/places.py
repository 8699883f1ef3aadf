"""Where the parts of a reproduction lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Folders and files below the output folder."""

    root: Path

    @property
    def list_folder(self) -> Path:
        """What the list is made of."""
        return self.root / "list"

    @property
    def download(self) -> Path:
        """img2dataset's shards."""
        return self.root / "download"

    @property
    def audit(self) -> Path:
        """The audit of the download."""
        return self.root / "audit"

    @property
    def subset(self) -> Path:
        """Uids that the filter keeps."""
        return self.root / "subset" / "uids.npy"

    @property
    def shards(self) -> Path:
        """Training shards."""
        return self.root / "shards"

    @property
    def manifest(self) -> Path:
        """Their manifest."""
        return self.root / "manifest.parquet"

    @property
    def shards_audit(self) -> Path:
        """The audit of the training shards, which training requires."""
        return self.root / "shards-audit"

    @property
    def report(self) -> Path:
        """The report's folder."""
        return self.root / "report"

    def run(self, label: str) -> Path:
        """A run folder."""
        return self.root / "runs" / label

    def evaluation(self, label: str) -> Path:
        """The scores of a run."""
        return self.root / "evaluations" / f"{label}.json"

    def record(self, stage: str) -> Path:
        """What a finished stage leaves behind."""
        return self.root / "stages" / f"{stage.replace('/', '-')}.json"

    def log(self, stage: str) -> Path:
        """What the commands of a stage print."""
        return self.root / "logs" / f"{stage.replace('/', '-')}.txt"
