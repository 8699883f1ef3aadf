"""The tables of `neuclip plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from rich.table import Table

from neuclip_scale.config import matmul_precision
from neuclip_scale.planning.choosing import Choice, Option
from neuclip_scale.planning.links import seconds_of
from neuclip_scale.planning.memory import MemoryPlan
from neuclip_scale.planning.parts import MOMENTS, Moment
from neuclip_scale.planning.report import RunPlan, arguments
from neuclip_scale.planning.site import Site

FACTORS = {"medium": "factors in bf16", "high": "TF32", "highest": "fp32, in 3xTF32"}


def memory_table(plan: MemoryPlan) -> Table:
    """Each part and when it is held; the sum at each moment."""
    told = f"{plan.parameters / 1e6:,.1f} M parameters"
    if plan.trained != plan.parameters:
        told += f", {plan.trained / 1e6:,.1f} M trained"
    title = f"memory of each of {plan.world_size} GPU(s): {plan.engine}; {told}"
    table = _table(title, "", "GiB", "host GiB", "held during", "")
    for item in plan.items:
        when = "the whole step" if item.moments == MOMENTS else _span(item.moments)
        sizes = (_gib(size) if size else "" for size in (item.device, item.host))
        table.add_row(item.name, *sizes, when, item.how)
    table.add_section()
    for moment in MOMENTS:
        most = "the most" if moment == plan.moment else ""
        table.add_row(f"sum, {moment}", _gib(plan.at(moment)), _gib(plan.host) if plan.host else "", moment, most)
    return table


def _span(moments: Sequence[str]) -> str:
    first, last = MOMENTS.index(cast(Moment, moments[0])), MOMENTS.index(cast(Moment, moments[-1]))
    whole = last - first + 1 == len(moments) > 2
    return f"{moments[0]} to {moments[-1]}" if whole else ", ".join(moments)


def traffic_table(option: Option, site: Site) -> Table:
    """Each kind of collective."""
    table = _table(
        "traffic of each GPU in a step", "", "collective", "ranks", "calls", "MB sent", "ms", "ms waited", ""
    )
    for transfer in option.transfers:
        milliseconds = f"{1000 * seconds_of(transfer, site):,.2f}"
        numbers = str(transfer.ranks), str(transfer.calls), f"{transfer.sent / 1e6:,.3f}", milliseconds
        wait = f"{1000 * option.time.waits.get(transfer.name, 0.0):,.2f}"
        how = "all wait for it" if transfer.exposed else "travels beside the encoders"
        table.add_row(transfer.name, transfer.kind.replace("_", "-"), *numbers, wait, how)
    table.add_section()
    waited = f"{1000 * sum(option.time.waits.values()):,.2f}"
    table.add_row("sum", "", "", "", f"{option.sent / 1e6:,.3f}", "", waited, "")
    return table


def budget_table(plan: RunPlan) -> Table:
    """Time of a step and cost of the run."""
    time, budget, assume = plan.shown.time, plan.budget, plan.site.assume
    table = Table(title=f"time and cost: {plan.recipe} {arguments(plan.shown.overrides)}", title_justify="left")
    for column in ("", "", "how it comes about"):
        table.add_column(column)
    peak = "the measured speed" if plan.site.measured.encoders else f"{assume.compute:.0%} of the peak assumed"
    arithmetic = f"{time.hardware_flops / 1e12:,.1f} TFLOP on each GPU at {peak}"
    if time.starting > 0.005 * time.encoders:
        arithmetic += f", and {time.starting:,.3f} s in which the host starts operations too slowly"
    travels, waits = 1000 * time.hidden, 1000 * time.exposed
    hidden = f"{waits:,.1f} ms for gradients and parameters, which travel {travels:,.1f} ms beside the encoders"
    factors = FACTORS[matmul_precision(plan.shown.config.train)]
    rows = [
        ("encoders", f"{time.encoders:,.3f} s", arithmetic),
        (
            "similarities, normalizers",
            f"{time.objective:,.3f} s",
            f"{time.objective_flops / 1e12:,.2f} TFLOP, {factors}",
        ),
        ("update", f"{time.update:,.3f} s", "by memory or PCIe"),
        ("waiting for the network", f"{time.communication + time.exposed:,.3f} s", hidden),
        ("step", f"{time.seconds:,.3f} s", f"MFU {time.mfu:.1%}"),
        ("pairs a second", f"{budget.samples_per_second:,.0f}", f"{budget.num_steps:,} steps"),
        ("days", f"{budget.days:,.2f}", f"with {assume.overhead:.0%} beside the steps"),
        ("GPU-hours", f"{budget.gpu_hours:,.0f}", ""),
        ("energy", f"{budget.energy_kwh:,.0f} kWh", f"{assume.power:.0%} of the board's power, PUE {assume.pue:g}"),
        ("price", _money(budget.price), f"at {plan.site.price:g} a GPU-hour" if budget.price else "give --price"),
        ("data", _large(budget.data_bytes), f"{budget.dataset_size:,} pairs of {assume.sample_kb:g} kB"),
        ("egress", _money(budget.egress_price), f"once; {_large(budget.read_bytes)} are read over the run"),
        ("checkpoints", _large(budget.kept_checkpoint_bytes), f"{_large(budget.checkpoint_bytes)} each"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def alternatives_table(choice: Choice) -> Table:
    """What else was tried."""
    table = _table(
        "alternatives, the fastest first", "", "GiB", "host GiB", "s a step", "MFU", "GB sent", "what to add"
    )
    for option in _worth_telling(choice):
        mark = "chosen" if option is choice.best else "" if option.fits else "does not fit"
        if option is choice.recipe:
            mark = f"recipe, {mark}" if mark else "recipe"
        memory, time = option.memory, option.time
        numbers = f"{time.seconds:,.3f}", f"{time.mfu:.1%}", f"{option.sent / 1e9:,.2f}"
        table.add_row(mark, _gib(memory.device), _gib(memory.host), *numbers, arguments(option.overrides))
    return table


def _worth_telling(choice: Choice) -> Iterator[Option]:
    """The recipe, what is chosen, and the first, which is the best, of each engine on device and host."""
    told = set()
    for option in choice.options:
        kind = option.memory.engine, option.memory.host > 2**20
        if kind not in told or option is choice.best or option is choice.recipe:
            told.add(kind)
            yield option


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        words = number == 0 or column in ("", "held during", "collective", "what to add")
        table.add_column(column, justify="left" if words else "right")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f}"


def _large(size: int) -> str:
    unit, name = (1e12, "TB") if size >= 1e12 else (1e9, "GB")
    return f"{size / unit:,.2f} {name}"


def _money(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.0f}"
