"""What a selection is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from neuclip_scale.queries.engines import EngineOptions
from neuclip_scale.subset.errors import UsageError
from neuclip_scale.subset.filters import BasicFilter, CaptionFilter, ClipScoreFilter, EnglishFilter, Filter, TextFilter


@dataclass(frozen=True)
class Columns:
    """What the pool's columns are called; the defaults are DataComp's."""

    uid_column: str = "uid"
    """Of the sample's uid."""
    text_column: str = "text"
    """Of the caption."""
    width_column: str = "original_width"
    """Of the picture's width in pixels, before any resizing."""
    height_column: str = "original_height"
    """Of its height."""
    b32_column: str = "clip_b32_similarity_score"
    """Of the scores of ViT-B/32."""
    l14_column: str = "clip_l14_similarity_score"
    """Of the scores of ViT-L/14."""

    def score(self, arch: str) -> str:
        """The column of a CLIP model's scores."""
        return self.l14_column if arch == "l14" else self.b32_column

    def read_by(self, each: Filter) -> dict[str, bool]:
        """The columns that a filter reads, and whether each must be of numbers."""
        match each:
            case BasicFilter():
                return {self.text_column: False, self.width_column: True, self.height_column: True}
            case ClipScoreFilter(arch=arch):
                return {self.score(arch): True}
            case EnglishFilter(column=column) if column:
                return {column: False}
            case CaptionFilter() | EnglishFilter() | TextFilter():
                return {self.text_column: False}
        return {}


@dataclass(frozen=True)
class SubsetRequest:
    """One selection: the rows of `metadata` that pass every filter."""

    metadata: str
    """Parquets: a folder, a pattern, a file, or an address as s3://bucket/metadata."""
    output: Path
    """The .npy to write; its report goes beside it, with .json added to the name."""
    filters: tuple[Filter, ...] = ()
    """None keeps every row."""
    columns: Columns = field(default_factory=Columns)
    engine: EngineOptions = field(default_factory=EngineOptions)
    """Where the top fraction is found."""
    num_workers: int = 1

    def check(self) -> None:
        """Raise `UsageError` or queries' `UsageError` for arguments that contradict each other."""
        self.engine.check()
        for each in self.filters:
            each.check()
        names = [each.name for each in self.filters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{twice[0]}: asked for twice. Give each filter once.")
        if self.num_workers < 1:
            raise UsageError(f"-j {self.num_workers}: give a number of processes, or 0 for every core.")
        if self.output.suffix != ".npy":
            raise UsageError(f"--save-path {self.output}: must end in .npy.")
        if self.output.is_dir():
            raise UsageError(f"--save-path {self.output}: is a folder. Give the .npy to write.")

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.output.with_name(self.output.name + ".json")

    @property
    def columns_read(self) -> dict[str, bool]:
        """All columns that are read, and whether each must be of numbers."""
        found = {self.columns.uid_column: False}
        for each in self.filters:
            found |= self.columns.read_by(each)
        return found

    @property
    def needs_embeddings(self) -> bool:
        """Whether the .npz beside each parquet is read."""
        return any(each.name == "image" for each in self.filters)
