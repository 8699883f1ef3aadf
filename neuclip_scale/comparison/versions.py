"""The code and the machine of each run, as environment.json tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuclip_scale.comparison.differences import Difference, differences
from neuclip_scale.comparison.run_folder import RunFolder

MACHINE = ("hostname", "cpu", "num_cpus", "gpus", "cuda", "python", "platform", "world_size", "compiled_towers")
"""Keys of environment.json that describe where a run ran; launch command and job number do not."""


def code_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Version, commit, uncommitted changes and package versions."""
    git = environment.get("git")
    packages = environment.get("packages")
    facts: dict[str, Any] = {"neuclip_scale": environment.get("neuclip_scale")}
    if isinstance(git, dict):
        facts |= {"git commit": git.get("commit"), "uncommitted changes": git.get("dirty")}
    if isinstance(packages, dict):
        facts |= {f"package {name}": version for name, version in packages.items()}
    return facts


def machine_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Host, CPU, GPUs, Python and world size, as far as they are there."""
    return {name: environment[name] for name in MACHINE if name in environment}


def code_differences(runs: Sequence[RunFolder]) -> list[Difference]:
    """What differs in the code of the runs."""
    return differences({run.label: code_facts(run.environment) for run in runs if run.environment is not None})


def machine_differences(runs: Sequence[RunFolder]) -> list[Difference]:
    """What differs in the machines of the runs."""
    return differences({run.label: machine_facts(run.environment) for run in runs if run.environment is not None})


def code_notes(runs: Sequence[RunFolder]) -> list[str]:
    """Runs of which the commit does not say what code ran."""
    notes = []
    for run in runs:
        if run.environment is None:
            continue
        git = run.environment.get("git")
        if not isinstance(git, dict) or not git.get("commit"):
            notes.append(f"{run.label}: the commit is not recorded, only the version of the package.")
        elif git.get("dirty") is None:
            notes.append(f"{run.label}: whether it ran with uncommitted changes is not recorded.")
        elif git["dirty"]:
            notes.append(f"{run.label}: ran with uncommitted changes, so its commit does not say what code ran.")
    return notes
