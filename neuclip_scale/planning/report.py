"""A plan in words and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from neuclip_scale.config import Recipe, local_batch_size, micro_batch_size, num_micro_batches, pairs_encoded_again
from neuclip_scale.planning.budget import Budget, dataset_size, num_steps, plan_budget
from neuclip_scale.planning.choosing import NEARLY, Choice, Option, Overrides, choose
from neuclip_scale.planning.memory import GIB
from neuclip_scale.planning.site import Site, check_assumptions

UNVALIDATED = (
    "Bytes of live tensors are held against measurements on CPUs (10 %) and on one GPU, bytes sent against gloo "
    "(exactly); allowances, times, energy and prices follow from stated assumptions and were not measured."
)


@dataclass(frozen=True)
class RunPlan:
    """Everything that is worked out for a recipe on some machines."""

    recipe: str
    site: Site
    choice: Choice
    budget: Budget
    """Of the recipe if it fits, else of what is chosen instead, else of the recipe all the same."""

    @property
    def fits(self) -> bool:
        """Whether the recipe can run as it stands."""
        return self.choice.recipe.fits

    @property
    def shown(self) -> Option:
        """The way that `budget` is of."""
        return self.choice.recipe if self.fits or self.choice.best is None else self.choice.best

    def document(self) -> dict[str, Any]:
        """Everything as plain values."""
        choice, site = self.choice, self.site
        return {
            "recipe": self.recipe,
            "gpu": site.gpu.name,
            "nodes": site.nodes,
            "world_size": site.world_size,
            "fits": self.fits,
            "problem": choice.recipe.problem,
            "assumptions": asdict(site.assume),
            "measured": list(site.measured.told),
            "sources": site.gpu.source,
            "as_written": option_document(choice.recipe),
            "chosen": None if choice.best is None else option_document(choice.best),
            "alternatives": [option_document(option) for option in choice.options],
            "budget_of": self.shown.overrides,
            "budget": asdict(self.budget),
            "words": list(sentences(self)),
        }


def plan_run(config: Recipe, site: Site, *, alternatives: bool = True) -> RunPlan:
    """Plan a recipe at a site; raises `ConfigError` for one that cannot be run there whatever the memory."""
    check_assumptions(site.assume)
    site = replace(site, dataset_size=dataset_size(config, site.dataset_size))
    num_steps(config, site.dataset_size)  # before minutes are spent on the rest
    choice = choose(config, site, alternatives=alternatives)
    shown = choice.recipe if choice.recipe.fits or choice.best is None else choice.best
    return RunPlan(config.name, site, choice, plan_budget(shown.config, site, shown.time))


def option_document(option: Option) -> dict[str, Any]:
    """One way as plain values."""
    transfers = [{**asdict(transfer), "sent": transfer.sent} for transfer in option.transfers]
    return {
        "overrides": option.overrides,
        "arguments": arguments(option.overrides),
        "fits": option.fits,
        "problem": option.problem,
        "memory": option.memory.document(),
        "transfers": transfers,
        "bytes_sent_per_step": option.sent,
        "time": {**asdict(option.time), "seconds": option.time.seconds},
    }


def arguments(overrides: Overrides) -> str:
    """What to add to `neuclip train` and to `neuclip plan`."""
    return " ".join(f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in overrides.items())


def sentences(plan: RunPlan) -> Iterator[str]:
    """What was found, for people."""
    choice, site = plan.choice, plan.site
    recipe, best = choice.recipe, choice.best
    where = f"{site.world_size} x {site.gpu.name} on {site.nodes} node(s)"
    if recipe.fits:
        room = (site.gpu.memory - recipe.memory.device) / GIB
        yield f"{plan.recipe} fits as it stands on {where}, with {room:,.1f} GiB to spare on each GPU."
    else:
        yield f"{plan.recipe} does not fit as it stands on {where}: {recipe.problem}."
    if best is None and len(choice.options) > 1:
        yield (
            "Nothing that was tried fits: not the smallest micro-batch with checkpointing, sharded and offloaded. "
            "Use more nodes or GPUs with more memory, a smaller model, or an objective that keeps less for each pair."
        )
    if best is not None and best is not recipe:
        gain = 1 - best.time.seconds / recipe.time.seconds
        told = f", {gain:.0%} less time" if gain > 0 else ""
        yield f"{'Faster' if recipe.fits else 'Add'}: {arguments(best.overrides)} ({best.memory.engine}{told})."
    if best is recipe and len(choice.options) > 1:
        yield f"Nothing that was tried is more than {NEARLY - 1:.0%} faster."
    yield from _how_it_runs(plan.shown, site)
    if site.measured.told:
        yield f"Measured: {'; '.join(site.measured.told)}. Everything else:"
    yield UNVALIDATED


def _how_it_runs(option: Option, site: Site) -> Iterator[str]:
    config, time, W = option.config, option.time, site.world_size
    several = num_micro_batches(config, W)
    pairs = f"Each GPU takes {local_batch_size(config, W):,} pairs a step"
    if several > 1:
        images, texts = pairs_encoded_again(config, W)
        again = f"{images:,} pictures and {texts:,} captions are encoded twice"
        yield f"{pairs} in {several} micro-batches of {micro_batch_size(config, W):,}: {again}."
    else:
        yield f"{pairs} at once: nothing is encoded twice."
    if config.model.grad_checkpointing:
        yield "Blocks keep their inputs alone and are run again in the backward pass: a third more arithmetic."
    yield f"The most memory is held in the step's {option.memory.moment} part."
    waiting = time.communication + time.exposed
    if waiting > 0.2 * time.seconds:
        yield f"{waiting / time.seconds:.0%} of the step waits for the network: fewer, larger micro-batches send less."
    rate = config.train.global_batch_size / time.seconds / site.nodes
    yield f"Every node must read, decode and deliver {rate:,.0f} pairs a second, which is not part of this plan."
