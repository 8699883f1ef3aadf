"""Loss and scores of a run over samples and over seconds of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.steps import Step

MAX_POINTS = 400
"""Points of a curve; each is the mean of equally many steps."""


@dataclass(frozen=True)
class Curve:
    """Points in the order of steps; samples and seconds are those at the end of what a point stands for."""

    samples: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Cumulative step_time, in which measuring and evaluating do not count."""
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run."""

    label: str
    loss: Curve
    evaluations: dict[str, Curve]
    """By name, as `zeroshot/top1`."""


def run_curves(runs: Sequence[RunFolder]) -> list[RunCurves]:
    """The curves of every run that has steps."""
    return [_curves(run) for run in runs if run.steps is not None and run.steps.by_number]


def _curves(run: RunFolder) -> RunCurves:
    assert run.steps is not None
    steps = run.steps.by_number
    # A step without its time adds none: the curve is then a little too far left.
    times = dict(zip(steps, accumulate(step.seconds or 0.0 for step in steps.values()), strict=True))
    points = [
        (_samples(place, step), times[place], step.loss) for place, step in steps.items() if step.loss is not None
    ]
    evaluations = {}
    for name, scores in sorted(run.steps.evaluations.items()):
        known = [place for place in sorted(scores) if place in steps]
        evaluations[name] = Curve(
            [_samples(place, steps[place]) for place in known],
            [times[place] for place in known],
            [scores[place] for place in known],
        )
    return RunCurves(run.label, thinned(points), {name: curve for name, curve in evaluations.items() if curve.values})


def thinned(points: Sequence[tuple[float, float, float]]) -> Curve:
    """(samples, seconds, value) rows as a curve of at most `MAX_POINTS` means."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    curve = Curve()
    for start in range(0, len(points), size):
        part = points[start : start + size]
        curve.samples.append(part[-1][0])
        curve.seconds.append(part[-1][1])
        curve.values.append(math.fsum(value for _, _, value in part) / len(part))
    return curve


def _samples(place: int, step: Step) -> float:
    return float(place) if step.samples_seen is None else step.samples_seen
