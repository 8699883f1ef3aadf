"""Facts that differ between runs, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Difference:
    """One fact with its value in every run."""

    name: str
    values: dict[str, Any]
    """Label of the run -> value; `NOT_RECORDED` where the run has none."""


def differences(facts: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """The facts that are not the same in all runs; `facts` maps a run's label to its facts by name."""
    names: Iterable[str] = dict.fromkeys(name for values in facts.values() for name in values)
    found = []
    for name in names:
        values = {label: known.get(name, NOT_RECORDED) for label, known in facts.items()}
        first, *others = values.values()
        if any(other != first for other in others):
            found.append(Difference(name, values))
    return found
