"""Runs whose recipes are equal but for the seed and what changes nothing computed: the seeds of one arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuclip_scale.comparison.drift import telling_fields
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.untrusted_text import show, unique


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe."""

    name: str
    """The objective, with the fields that tell it from other arms of the same objective."""
    runs: tuple[RunFolder, ...]


def group_arms(runs: Sequence[RunFolder]) -> list[Arm]:
    """The arms in the order of their first runs; a run without a readable recipe is one by itself."""
    telling = telling_fields(runs)
    fields = {run.label: {k: v for k, v in telling.get(run.label, {}).items() if k != "seed"} for run in runs}
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        key = f"unreadable {run.label}" if run.recipe is None else repr(sorted(fields[run.label].items()))
        groups.setdefault(key, []).append(run)
    names = _names([group[0] for group in groups.values()], fields)
    return [Arm(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True)]


def _names(firsts: Sequence[RunFolder], fields: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A name per arm, different for all."""
    objectives = [show(fields[run.label].get("objective.name", run.label)) for run in firsts]
    names = []
    for run, objective in zip(firsts, objectives, strict=True):
        own = fields[run.label]
        same = [fields[other.label] for other, name in zip(firsts, objectives, strict=True) if name == objective]
        differing = [name for name in own if any(each.get(name) != own[name] for each in same)]
        # Beyond a few fields the name of a run says more than the list would.
        values = ", ".join(f"{name}={show(own[name])}" for name in differing)
        told = values if 0 < len(differing) <= 3 and len(values) <= 80 else run.label
        names.append(objective if len(same) == 1 else f"{objective} ({told})")
    named = zip(names, firsts, strict=True)
    return unique([name if names.count(name) == 1 else f"{name} [{run.label}]" for name, run in named])
