"""`neuclip plan RECIPE --world-size N`: what each rank will hold in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from neuclip_scale.commands.train import split_arguments
from neuclip_scale.config import load_recipe
from neuclip_scale.files import write_json

if TYPE_CHECKING:
    from neuclip_scale.planning import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Plan a run's memory before it is queued. Fields of the recipe are given as section.field=value."""

    recipe: Annotated[str, tyro.conf.Positional]
    """A packaged recipe or a YAML file."""
    world_size: int = 1
    """Ranks of the run, one per GPU."""
    dataset_size: int = 0
    """Pairs in the data set, for objectives that keep something for each."""
    json: Path | None = None
    """Also write the plan to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, raises `ConfigError` for a run that cannot be."""
    overrides, options = split_arguments(argv)
    arguments = tyro.cli(PlanArguments, args=options, prog="neuclip plan")
    config = load_recipe(arguments.recipe, overrides)
    from neuclip_scale.planning import plan_memory

    plan = plan_memory(config, arguments.world_size, arguments.dataset_size)
    console = Console(highlight=False)
    console.print(_table(plan))
    console.print("Without the allocator's own, the framework's, and the data loader's workers.", markup=False)
    if arguments.json:
        write_json(arguments.json, plan.document())
    return 0


def _table(plan: MemoryPlan) -> Table:
    told = f"{plan.parameters / 1e6:,.1f} M parameters"
    if plan.trained != plan.parameters:
        told += f", {plan.trained / 1e6:,.1f} M trained"
    table = Table(title=f"memory of each of {plan.world_size} rank(s): {plan.engine}; {told}", title_justify="left")
    table.add_column("")
    table.add_column("device GiB", justify="right")
    table.add_column("host GiB", justify="right")
    table.add_column("")
    for item in plan.items:
        table.add_row(item.name, _gib(item.device), _gib(item.host), item.how)
    table.add_section()
    table.add_row("sum", _gib(plan.device), _gib(plan.host), "")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f}" if size else "-"
