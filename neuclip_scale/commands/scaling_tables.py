"""The tables of `neuclip plan --scaling`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from neuclip_scale.planning.scaling import Line, Point, ScalingPlan
from neuclip_scale.planning.scaling_report import why
from neuclip_scale.planning.sweep import INTERCONNECTS

WIDTH = 100
"""Least width of a table: its title has to stand in one line."""
FEW = 4
"""Lines of which every point is told."""


def scaling_tables(plan: ScalingPlan) -> Iterator[Table]:
    """Pairs a second of every line, where each stops, and of few lines every point."""
    for regime in dict.fromkeys(line.regime for line in plan.lines):
        lines = [line for line in plan.lines if line.regime == regime]
        yield _rates(plan, lines)
        yield _stops(lines)
    if len(plan.lines) <= FEW:
        yield from map(_points, plan.lines)


def _rates(plan: ScalingPlan, lines: list[Line]) -> Table:
    table = Table(title=f"{_told(plan, lines[0])}: pairs a second, efficiency", title_justify="left", min_width=WIDTH)
    table.add_column("engine")
    table.add_column("network")
    for gpus in plan.sweep.gpus:
        table.add_column(f"{gpus:,}", justify="right")
    for place, line in enumerate(lines):
        points = {point.world_size: point for point in line.points}
        cells = [_cell(line, points[gpus]) if gpus in points else "-" for gpus in plan.sweep.gpus]
        ends = place + 1 == len(lines) or lines[place + 1].engine != line.engine
        table.add_row(line.engine, line.interconnect, *cells, end_section=ends)
    return table


def _told(plan: ScalingPlan, line: Line) -> str:
    where = f"{plan.recipe.name} on {plan.site.gpu.name}"
    if line.regime == "weak":
        return f"{where}, weak scaling ({plan.sweep.pairs_per_gpu:,} pairs a GPU)"
    return f"{where}, strong scaling ({plan.recipe.train.global_batch_size:,} pairs a step)"


def _cell(line: Line, point: Point) -> str:
    if point.problem:
        return "no room"
    rate = point.pairs_per_second
    number = f"{rate / 1e6:.2f} M" if rate >= 999_500 else f"{rate / 1e3:,.1f} k" if rate >= 1e4 else f"{rate:,.0f}"
    return f"{number} {line.efficiency(point):.0%}"


def _stops(lines: list[Line]) -> Table:
    table = Table(
        title=f"{lines[0].regime} scaling: where it stops, and what has grown", title_justify="left", min_width=WIDTH
    )
    for column in ("engine", "network", "pairs a second of a GPU, against the best"):
        table.add_column(column)
    for line in lines:
        table.add_row(line.engine, line.interconnect, why(line))
    return table


def _points(line: Line) -> Table:
    network = INTERCONNECTS[line.interconnect].told
    table = Table(title=f"{line.regime} scaling, {line.engine}, {network}", title_justify="left", min_width=WIDTH)
    columns = (
        "GPUs",
        "pairs a step",
        "of a GPU",
        "at a time",
        "GiB",
        "s a step",
        "pairs/s",
        "efficiency",
        "MFU",
        "waits",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for point in line.points:
        sizes = point.world_size, point.global_batch_size, point.local_batch_size, point.micro_batch_size
        time, gib = point.time, f"{point.memory / 2**30:,.1f}"
        waits = (time.communication + time.exposed) / time.seconds
        shares = "no room" if point.problem else f"{line.efficiency(point):.0%}", f"{time.mfu:.1%}", f"{waits:.0%}"
        rates = f"{time.seconds:,.4f}", f"{point.pairs_per_second:,.0f}"
        table.add_row(*(f"{size:,}" for size in sizes), gib, *rates, *shares)
    return table
