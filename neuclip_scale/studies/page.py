"""A report of a study: titles, paragraphs, tables and pictures on one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from neuclip_scale.files import write_text
from neuclip_scale.html import embedded, render


@dataclass
class Section:
    """A heading with what stands below it."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    """PNG files, which the page takes in."""
    code: str = ""

    @property
    def pictures(self) -> list[str]:
        """The images in base64."""
        return [embedded(path.read_bytes()) for path in self.images]


@dataclass
class Page:
    """A report."""

    title: str
    sections: list[Section]

    def write(self, path: Path) -> None:
        """Write the page, atomically."""
        write_text(path, render("study.html", title=self.title, sections=self.sections))
