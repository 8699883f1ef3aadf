"""`neuclip plan RECIPE --nodes N --gpu G`: what a run will hold, send, take and cost, before it is queued.

With `--scaling`: the same over numbers of GPUs, engines and networks, where it stops to scale and why.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from neuclip_scale.commands.train import split_arguments
from neuclip_scale.config import ConfigError, Recipe, load_recipe, unused_length
from neuclip_scale.files import atomic_file, write_json
from neuclip_scale.planning.site import Assumptions, Site, check_site
from neuclip_scale.planning.sweep import Sweep

if TYPE_CHECKING:
    from neuclip_scale.planning import RunPlan

LEAST_WIDTH, WIDE = 120, 150
FLAGS = ("--scaling", "--no-scaling", "--alternatives", "--no-alternatives")
"""Options without a value."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Plan a run before it is queued: memory, traffic, time and cost. Fields of the recipe are given as
    section.field=value. Exit status: 0 the recipe fits as it stands, 1 it does not (what would is printed), 2 it cannot
    run on so many GPUs at all. With --scaling: over numbers of GPUs, engines and networks instead of one site; 1 if
    nothing fits.
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
    scaling: bool = False
    """Plan many numbers of GPUs, engines and networks; --nodes and --world-size do not count then."""
    sweep: Annotated[Sweep, tyro.conf.OmitArgPrefixes] = field(default_factory=Sweep)
    plot: Path | None = None
    """With --scaling: draw it into this PNG."""
    beside: tuple[Path, ...] = ()
    """With --plot: plans of other recipes, what --scaling --json wrote, to draw above."""
    measured: tuple[Path, ...] = ()
    """Take speeds from a run's summary.json or from what `tools/bench.py kernels|loss|npn|step --json` wrote."""
    assume: Assumptions = field(default_factory=Assumptions)
    """What the times, energy and storage take for granted."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or 1, raises `ConfigError` for a run that cannot be."""
    overrides, options = split_arguments(argv, flags=FLAGS)
    arguments = tyro.cli(PlanArguments, args=options, prog="neuclip plan")
    config = load_recipe(arguments.recipe, overrides)
    _check(arguments)
    if warning := unused_length(config.train):
        print(f"warning: {warning}", file=sys.stderr)
    from neuclip_scale.planning import GPU_TYPES, plan_run
    from neuclip_scale.planning.measured import read_measured

    site = Site(
        gpu=GPU_TYPES[arguments.gpu],
        world_size=check_site(arguments.nodes, arguments.gpus_per_node, arguments.world_size),
        gpus_per_node=arguments.gpus_per_node,
        dataset_size=arguments.dataset_size,
        price=arguments.price,
        egress_price=arguments.egress_price,
        assume=arguments.assume,
        measured=read_measured(arguments.measured),
    )
    if arguments.scaling:
        return _scaling(config, site, arguments)
    plan = plan_run(config, site, alternatives=arguments.alternatives)
    _print(plan)
    if arguments.json:
        write_json(arguments.json, plan.document())
    return 0 if plan.fits else 1


def _check(arguments: PlanArguments) -> None:
    """Options that would be ignored, and prices that are none."""
    prices = {"--price": arguments.price, "--egress-price": arguments.egress_price}
    for option, price in prices.items():
        if not 0 <= price < math.inf:
            raise ConfigError(option, price, "is no price", "Give one of zero or more, or leave it out.")
    drawn = {"--plot": arguments.plot, "--beside": arguments.beside}
    usual = vars(Sweep())
    swept = {
        f"--{name.replace('_', '-')}": value for name, value in vars(arguments.sweep).items() if value != usual[name]
    }
    for option, given in (drawn | swept).items():
        if given and not arguments.scaling:
            remedy = "Add --scaling, or leave it out; one site is --nodes N --gpus-per-node M."
            raise ConfigError(option, _plain(given), "is of --scaling alone", remedy)
    of_one_site = {**prices, "--no-alternatives": not arguments.alternatives}
    for option, given in of_one_site.items():
        if given and arguments.scaling:
            raise ConfigError(option, str(given), "is of one site alone", "Leave it out, or leave out --scaling.")
    if arguments.beside and not arguments.plot:
        raise ConfigError("--beside", _plain(arguments.beside), "nothing is drawn", "Add --plot FILE.")


def _plain(given: object) -> object:
    return [str(path) for path in given] if isinstance(given, tuple) else str(given)


def _scaling(config: Recipe, site: Site, arguments: PlanArguments) -> int:
    """Plan, print, write and draw; 1 if nothing fits."""
    from neuclip_scale.commands.scaling_tables import scaling_tables
    from neuclip_scale.planning.scaling import plan_scaling
    from neuclip_scale.planning.scaling_plot import draw, read_document
    from neuclip_scale.planning.scaling_report import document, sentences

    others = [read_document(path) for path in arguments.beside]
    plan = plan_scaling(config, site, arguments.sweep)
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, WIDE)
    for table in scaling_tables(plan):
        console.print(table)
    for sentence in sentences(plan):
        console.print(sentence)
    if arguments.json:
        write_json(arguments.json, document(plan))
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(arguments.plot) as file:
            file.write(draw([*others, document(plan)]))
    if not plan.fits:
        problem = plan.lines[-1].points[-1].problem
        print(f"error: {config.name} fits on none of these: {problem}. Use GPUs with more memory, "
              "model.grad_checkpointing=true, or a smaller model.", file=sys.stderr)  # fmt: skip
    return 0 if plan.fits else 1


def _print(plan: RunPlan) -> None:
    from neuclip_scale.commands.plan_tables import alternatives_table, budget_table, memory_table, traffic_table
    from neuclip_scale.planning.report import sentences

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, LEAST_WIDTH)
    console.print(memory_table(plan.shown.memory))
    if plan.shown.transfers:
        console.print(traffic_table(plan.shown, plan.site))
    console.print(budget_table(plan))
    if len(plan.choice.options) > 1:
        console.print(alternatives_table(plan.choice))
    for sentence in sentences(plan):
        console.print(sentence)
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
