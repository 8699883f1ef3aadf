"""Equal wall-clock: the time that was meant, the time that it took, and a comparison that says both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuclip_scale.comparison import Comparison
from neuclip_scale.run_folder import read_object


@dataclass(frozen=True)
class ArmTime:
    """What the runs of an arm took."""

    arm: str
    steps: int
    seconds: list[float]
    """Of training, one for each run."""


@dataclass(frozen=True)
class WallClock:
    """The budget of equal wall-clock, as planned and as it was."""

    target: float
    """Seconds that every run was given steps for, at the speed of its arm at equal samples."""
    arms: list[ArmTime]

    @classmethod
    def of(cls, plan: Mapping[str, Any], folders: Sequence[Path]) -> WallClock:
        """From a study's plan.json and its finished runs at equal wall-clock."""
        times: dict[str, list[float]] = {}
        for folder in folders:
            summary = read_object(folder / "summary.json")
            times.setdefault(summary["recipe"], []).append(summary["train_seconds"])
        return cls(plan["seconds"], [ArmTime(arm, plan["seconds_steps"][arm], part) for arm, part in times.items()])

    def lines(self) -> list[str]:
        """Target against actual, for people."""
        told = [
            f"Equal wall-clock: every run has the steps of {self.target:.1f} s at its arm's speed at equal samples."
        ]
        for arm in self.arms:
            mean = statistics.mean(arm.seconds)
            told.append(
                f"{arm.arm}: {arm.steps:,} steps took {mean:.1f} s ({min(arm.seconds):.1f} to {max(arm.seconds):.1f}), "
                f"{100 * (mean / self.target - 1):+.1f} % of the target."
            )
        return told

    def document(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)

    def said_in(self, comparison: Comparison) -> Comparison:
        """`comparison` with these lines among its notes."""
        drift = comparison.drift
        return replace(comparison, drift=replace(drift, notes=[*drift.notes, *self.lines()]))
