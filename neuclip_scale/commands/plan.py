"""`neuclip plan RECIPE --nodes N --gpu G`: what a run will hold, send, take and cost, before it is queued."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from neuclip_scale.commands.train import split_arguments
from neuclip_scale.config import load_recipe
from neuclip_scale.files import write_json
from neuclip_scale.planning.site import Assumptions, Site, check_site

if TYPE_CHECKING:
    from neuclip_scale.planning import RunPlan

LEAST_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Plan a run before it is queued: memory, traffic, time and cost. Fields of the recipe are given as
    section.field=value. Exit status: 0 the recipe fits as it stands, 1 it does not (what would is printed), 2 it cannot
    run on so many GPUs at all.
    """

    recipe: Annotated[str, tyro.conf.Positional]
    """A packaged recipe or a YAML file."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each, one rank on each GPU."""
    world_size: int = 0
    """Ranks in all, where they are not nodes x GPUs per node."""
    gpu: Literal["h100", "h200", "a100", "a100-80", "a100-40"] = "h100"
    """Kind of GPU; a100 has 80 GB."""
    dataset_size: int = 0
    """Pairs in the data set, for a recipe that is not a packaged one."""
    price: float = 0.0
    """Price of a GPU for an hour."""
    egress_price: float = 0.0
    """Price of reading 10^9 bytes from a remote store."""
    alternatives: bool = True
    """Whether to look for better ways; without, the recipe alone is planned, in half of the time."""
    json: Path | None = None
    """Also write the plan to this file."""
    assume: Assumptions = field(default_factory=Assumptions)
    """What the times, energy and storage take for granted."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or 1, raises `ConfigError` for a run that cannot be."""
    overrides, options = split_arguments(argv)
    arguments = tyro.cli(PlanArguments, args=options, prog="neuclip plan")
    config = load_recipe(arguments.recipe, overrides)
    from neuclip_scale.planning import GPU_TYPES, plan_run

    site = Site(
        gpu=GPU_TYPES[arguments.gpu],
        world_size=check_site(arguments.nodes, arguments.gpus_per_node, arguments.world_size),
        gpus_per_node=arguments.gpus_per_node,
        dataset_size=arguments.dataset_size,
        price=arguments.price,
        egress_price=arguments.egress_price,
        assume=arguments.assume,
    )
    plan = plan_run(config, site, alternatives=arguments.alternatives)
    _print(plan)
    if arguments.json:
        write_json(arguments.json, plan.document())
    return 0 if plan.fits else 1


def _print(plan: RunPlan) -> None:
    from neuclip_scale.commands.plan_tables import alternatives_table, budget_table, memory_table, traffic_table
    from neuclip_scale.planning.report import sentences

    console = Console(highlight=False)
    console.width = max(console.width, LEAST_WIDTH)
    console.print(memory_table(plan.shown.memory))
    if plan.shown.transfers:
        console.print(traffic_table(plan.shown, plan.site))
    console.print(budget_table(plan))
    if len(plan.choice.options) > 1:
        console.print(alternatives_table(plan.choice))
    for sentence in sentences(plan):
        console.print(sentence, markup=False)
    if not plan.fits:
        print(f"error: {plan.recipe} does not fit: {plan.choice.recipe.problem}. {_remedy(plan)}", file=sys.stderr)


def _remedy(plan: RunPlan) -> str:
    from neuclip_scale.planning.report import arguments

    best = plan.choice.best
    if best is not None:
        return f"Add {arguments(best.overrides)}"
    if len(plan.choice.options) == 1:
        return "Plan it without --no-alternatives to see what would fit."
    return "Use more nodes, GPUs with more memory, or a smaller model."
