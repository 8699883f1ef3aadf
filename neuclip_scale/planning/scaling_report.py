"""A plan of scaling in words and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from neuclip_scale.planning.report import arguments
from neuclip_scale.planning.scaling import STOPS, Line, Point, ScalingPlan
from neuclip_scale.planning.sweep import INTERCONNECTS

CALCULATED = "calculated: a roofline of arithmetic and links and a simulated step"
NOT_MEASURED = f"{CALCULATED}; nothing was measured on these GPUs"
CAUSES = {
    "encoders": "the encoders' second forward pass",
    "starting operations": "operations too small for the GPU, which the host starts too slowly",
    "objective": "similarities, which grow with the whole batch, and the NPN, whose kernels are as many for few pairs",
    "update": "the update, which does not shrink with the batch",
    "features": "the features' all-gather",
    "sample indices": "the indices' all-gather",
    "log-normalizers": "the log-normalizers' all-gather",
    "NPN gradients": "the NPN's all-reduces",
    "gradients": "gradients that travel too long for the backward pass",
    "gradients, replicas": "gradients between nodes",
    "parameters, forward": "parameters gathered for the forward pass",
    "parameters, backward": "parameters gathered for the backward pass",
    "norms": "the gradients' norms",
    "gradient norms": "the gradients' norms",
    "parameters, small": "small parameters, gathered after each step",
    "temperature": "the temperature",
    "parameters, updated": "updated parameters, gathered after each step",
}
"""Parts of a step: what it means that they grow."""
NUM_CAUSES = 3


def sentences(plan: ScalingPlan) -> Iterator[str]:
    """What was found, for people; `why` has each line's."""
    sweep, told = plan.sweep, plan.site.measured.told
    batch = plan.recipe.train.global_batch_size
    yield (
        f"Strong: {batch:,} pairs a step. Weak: {sweep.pairs_per_gpu:,} pairs of each GPU. Each with the largest "
        "micro-batch that fits; efficiency is against a GPU at the smallest number of GPUs that fits."
    )
    if any(line.efficiency(point) > 1.01 for line in plan.lines for point in line.fitting):
        yield "Above 100 %: the smallest number of GPUs has several micro-batches and runs the encoders forward twice."
    streams = [
        point.world_size for line in plan.lines for point in line.points if "data.num_streams" in point.overrides
    ]
    if streams:
        numbers = ", ".join(f"{each:,}" for each in sorted(set(streams)))
        yield f"With {numbers} GPUs data.num_streams must be another one, which changes the order of the data."
    for reason, places in _by_reason(plan.skipped).items():
        yield f"Left out: {', '.join(places)}: {reason.rstrip('.')}."
    yield f"Measured: {'; '.join(told)}. The rest is {CALCULATED}." if told else f"It is all {NOT_MEASURED}."


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place, reason in skipped.items():
        found.setdefault(reason, []).append(place)
    return found


def why(line: Line) -> str:
    """Where a line stops scaling, and what has grown there."""
    if not line.fitting:
        return f"does not fit: {line.points[-1].problem}"
    best, last = line.best, line.fitting[-1]
    if best is last:
        return f"a GPU does most at {best.world_size:,} GPUs, the largest number here"
    stops = [line.stop(share) for share in STOPS]
    told = [f"below {share:.0%} from {stop.world_size:,}" for share, stop in zip(STOPS, stops, strict=True) if stop]
    if len(told) < len(STOPS) and last not in stops:
        told.append(f"{last.rate / best.rate:.0%} at {last.world_size:,}")
    at = next((stop for stop in stops if stop), last)
    return f"best at {best.world_size:,}, {', '.join(told)}; at {at.world_size:,}: {'; '.join(_causes(line, at))}"


def _causes(line: Line, point: Point) -> Iterator[str]:
    for name, share in list(line.losses(point).items())[:NUM_CAUSES]:
        if share >= 0.05:
            latency = " (latency)" if name in point.late else ""
            yield f"{share:.0%} {CAUSES.get(name, name)}{latency}"


def document(plan: ScalingPlan) -> dict[str, Any]:
    """Everything as plain values."""
    site, sweep = plan.site, plan.sweep
    return {
        "what": CALCULATED if site.measured.told else NOT_MEASURED,
        "measured": list(site.measured.told),
        "recipe": plan.recipe.name,
        "preset": plan.recipe.model.preset,
        "objective": plan.recipe.objective.name,
        "gpu": site.gpu.name,
        "gpus_per_node": site.gpus_per_node,
        "sources": site.gpu.source,
        "interconnects": {name: asdict(INTERCONNECTS[name]) for name in sweep.interconnects},
        "assumptions": asdict(site.assume),
        "sweep": asdict(sweep),
        "skipped": plan.skipped,
        "words": list(sentences(plan)),
        "lines": [_line(line) for line in plan.lines],
    }


def _line(line: Line) -> dict[str, Any]:
    stops = {f"{share:.0%}": stop.world_size if (stop := line.stop(share)) else None for share in STOPS if line.fitting}
    return {
        "regime": line.regime,
        "engine": line.engine,
        "interconnect": line.interconnect,
        "best": line.best.world_size if line.fitting else None,
        "below": stops,
        "why": why(line),
        "points": [_point(line, point) for point in line.points],
    }


def _point(line: Line, point: Point) -> dict[str, Any]:
    efficiency = {} if point.problem else {"efficiency": _short(line.efficiency(point))}
    return {
        "gpus": point.world_size,
        "global_batch_size": point.global_batch_size,
        "micro_batch_size": point.micro_batch_size,
        "memory_gib": _short(point.memory / 2**30),
        "problem": point.problem,
        "arguments": arguments(point.overrides),
        "seconds": _short(point.time.seconds),
        "pairs_per_second": _short(point.pairs_per_second),
        **efficiency,
        "mfu": _short(point.time.mfu),
        "parts": {name: _short(spent) for name, spent in point.parts().items() if spent > 0.002 * point.time.seconds},
    }


def _short(value: float) -> float:
    """Four digits: more than the assumptions bear."""
    return float(f"{value:.4g}")
