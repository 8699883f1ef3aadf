"""How the tensors that were given differ from those of a model, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_LISTED = 10

Shapes = Mapping[str, Sequence[int]]


def misfits(given: Shapes, wanted: Shapes) -> str:
    """Names that are missing, unexpected or of another shape, a sentence for each kind; empty if all fit."""
    both = sorted(wanted.keys() & given.keys())
    shapes = [
        f"{name} {list(given[name])} instead of {list(wanted[name])}"
        for name in both
        if list(given[name]) != list(wanted[name])
    ]
    kinds = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    return " ".join(_sentence(kind, items) for kind, items in kinds.items() if items)


def _sentence(kind: str, items: list[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{len(items)} {kind}: {', '.join(items[:MAX_LISTED])}{more}."
