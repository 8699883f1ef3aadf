"""What a selection found, and its report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuclip_scale.subset.cuts import Cut

_FORMAT = 1


@dataclass(frozen=True)
class FilterOutcome:
    """One filter, in the order in which rows were asked."""

    name: str
    settings: dict[str, Any]
    asked: int
    """Rows that passed all filters before it."""
    passed: int
    cut: Cut | None = None
    """What a fraction came to."""


@dataclass(frozen=True)
class Unreadable:
    """A file of the pool, or some row groups of it, of which nothing was used."""

    file: str
    fault: str
    num_rows: int | None = None
    """Rows that were lost; None where that is not known."""


@dataclass(frozen=True)
class Subset:
    """A selection that is on the disk."""

    path: Path
    """The .npy: `u8,u8`, sorted, each uid once."""
    num_rows: int
    """Of the pool, as far as it could be read."""
    num_uids: int
    num_repeated: int
    """Rows that passed, and whose uid another row that passed has."""
    filters: tuple[FilterOutcome, ...]
    unreadable: tuple[Unreadable, ...]
    num_unusable: int
    """Rows without a uid, or whose embedding is not finite."""
    unusable: tuple[dict[str, Any], ...]
    """The first of them: file, row and reason."""
    digest: str
    """Of filters and pool."""
    filters_digest: str
    """Of the filters alone, equal on any machine."""
    uids_digest: str
    """Of the uids."""
    seconds: float
    was_there: bool = False
    """Whether it was complete already."""

    @property
    def status(self) -> int:
        """1 when something of the pool could not be used, else 0."""
        return int(bool(self.unreadable or self.num_unusable))

    def document(self) -> dict[str, Any]:
        """The report, for `write_json`."""
        document = {"format": _FORMAT, "status": self.status, **asdict(self)}
        del document["was_there"]
        return document


def read_report(report: Path, path: Path) -> Subset | None:
    """The selection that a report describes; None for a file that is none."""
    try:
        document = json.loads(report.read_bytes())
        if document.pop("format") != _FORMAT:
            return None
        document.pop("status")
        filters = [FilterOutcome(**{**each, "cut": _cut(each["cut"])}) for each in document.pop("filters")]
        unreadable = [Unreadable(**each) for each in document.pop("unreadable")]
        unusable = tuple(document.pop("unusable"))
        parts = {"filters": tuple(filters), "unreadable": tuple(unreadable), "unusable": unusable}
        return Subset(**{**document, **parts, "path": path, "was_there": True})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _cut(told: dict[str, Any] | None) -> Cut | None:
    """JSON has no infinite threshold, which a fraction of no row has: it stands there as a text."""
    return Cut(**{**told, "threshold": float(told["threshold"])}) if told else None
