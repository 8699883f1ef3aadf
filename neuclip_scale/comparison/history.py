"""Runs whose steps were not all made by one recipe and one code, as starts.jsonl tells them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from neuclip_scale.comparison.differences import differences
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.versions import code_facts
from neuclip_scale.config import changes_training
from neuclip_scale.telemetry.starts import Start, read_starts
from neuclip_scale.untrusted_text import listed, plain, printable, show


def mixed_runs(runs: Sequence[RunFolder]) -> list[str]:
    """A sentence for every start of a run that went on with another recipe or other code; never raises."""
    return [text for run in runs for text in _mixed(run)]


def _mixed(run: RunFolder) -> list[str]:
    try:
        starts = read_starts(run.path)
        told = [text for start in starts for text in _other_recipe(run, start)]
        return told + [text for pair in pairwise(starts) for text in _other_code(run, *pair)]
    except (OSError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        return [f"{run.label}: how it was started cannot be read ({printable(str(error))[:300]})."]


def _other_recipe(run: RunFolder, start: Start) -> list[str]:
    changed = {name: values for name, values in plain(start.changed).items() if changes_training(name)}
    shown = listed([f"{name} {show(before)} -> {show(after)}" for name, (before, after) in changed.items()])
    return [f"{run.label}: trained with another recipe from step {int(start.step)} on: {shown}."] if changed else []


def _other_code(run: RunFolder, before: Start, start: Start) -> list[str]:
    facts = {"before": code_facts(plain(before.environment)), "after": code_facts(plain(start.environment))}
    names = listed([each.name for each in differences(facts)])
    return [f"{run.label}: trained by other code from step {int(start.step)} on: {names}."] if names else []
