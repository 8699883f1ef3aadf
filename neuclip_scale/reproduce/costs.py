"""What a reproduction will take, for --dry-run: calculated, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.reproduce.experiment import published_of
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.training import train_arguments


@dataclass(frozen=True)
class Estimate:
    """Sentences, and the figures in them."""

    lines: list[str]
    gpu_hours: float = 0.0


def estimate(request: Request, gpu: str) -> Estimate:
    """Storage and training of all methods and seeds; `gpu`: a name of `neuclip plan`."""
    experiment = request.experiment
    num_runs = len(request.labels)
    if not experiment.gpus_per_node:
        if not experiment.minutes_per_run:
            return Estimate([f"{num_runs} trainings on this machine's processors, {experiment.jobs} at a time."])
        minutes = experiment.minutes_per_run * -(-num_runs // experiment.jobs)
        return Estimate(
            [
                f"{num_runs} trainings, {experiment.jobs} at a time, of about {experiment.minutes_per_run:g} minutes "
                f"each on a core of the machine it was measured on: {minutes:.0f} minutes. The other stages: about 5."
            ]
        )
    return _on_gpus(request, gpu, num_runs)


def _on_gpus(request: Request, gpu: str, num_runs: int) -> Estimate:
    from neuclip_scale.planning import GPU_TYPES, plan_run
    from neuclip_scale.planning.site import Site

    experiment = request.experiment
    known = published_of(experiment)
    recipes: dict[str, Recipe] = {}
    for label, (method, _) in request.labels.items():
        arguments = train_arguments(request, label)
        recipes.setdefault(method, load_recipe(arguments[0], arguments[1:]))
    site = Site(
        gpu=GPU_TYPES[gpu], world_size=experiment.nodes * experiment.gpus_per_node,
        gpus_per_node=experiment.gpus_per_node, dataset_size=known.pairs, price=request.price,
    )  # fmt: skip
    lines, hours, kwh = [], 0.0, 0.0
    if not known.pairs:
        return Estimate(["No estimate: how many pairs there will be is not known (`neuclip plan --dataset-size`)."])
    seeds = len(experiment.seeds)
    for method, recipe in recipes.items():
        plan = plan_run(recipe, site, alternatives=False)
        budget = plan.budget
        fits = "" if plan.fits else f" It does not fit as it stands: {plan.choice.recipe.problem}."
        lines.append(
            f"{method}: {seeds} x {budget.gpu_hours:,.1f} GPU-hours ({budget.days:.2f} days on {site.world_size} "
            f"{gpu}), {budget.energy_kwh:,.1f} kWh each.{fits}"
        )
        hours, kwh = hours + seeds * budget.gpu_hours, kwh + seeds * budget.energy_kwh
    kilobytes = site.assume.sample_kb
    if known.listed:
        lines.append(
            f"Download: {known.listed:,} urls; about {known.listed * kilobytes / 1e9:,.1f} TB at {kilobytes:g} kB a "
            "pair, and as much again for the training shards."
        )
    price = f", {request.price * hours:,.0f} at {request.price:g} a GPU-hour" if request.price else ""
    lines.append(
        f"All {num_runs} trainings: {hours:,.0f} GPU-hours, {kwh:,.0f} kWh{price} (`neuclip plan`'s roofline)."
    )
    return Estimate(lines, hours)
