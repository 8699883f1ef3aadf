"""What the recipes of runs differ in: the method, the seed, or more than that."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from neuclip_scale.comparison.differences import Difference, differences
from neuclip_scale.comparison.recipe_file import filled_notes
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.config import NEUTRAL, PLACES
from neuclip_scale.untrusted_text import listed

Kind = Literal["method", "seed", "by_design", "neutral", "other"]


@dataclass(frozen=True)
class Drift:
    """Recipe fields that differ, sorted by what they make of a comparison."""

    method: list[Difference] = field(default_factory=list)
    """`objective.*` and `optim.temperature_*`: what a comparison of methods is about."""
    seed: list[Difference] = field(default_factory=list)
    by_design: list[Difference] = field(default_factory=list)
    """Those that whoever compares has named as intended."""
    neutral: list[Difference] = field(default_factory=list)
    """Those that change nothing computed; they may change how long it takes."""
    other: list[Difference] = field(default_factory=list)
    """Everything else: the scores then differ for more reasons than the method."""
    notes: list[str] = field(default_factory=list)
    num_recipes: int = 0
    num_runs: int = 0

    @property
    def verdict(self) -> str:
        """The sentence a reader must see first."""
        unread = self.num_runs - self.num_recipes
        rest = f" {unread} of {self.num_runs} recipes could not be read." if unread else ""
        if self.other:
            told = f"Recipes differ in more than the method: {_names(self.other)}."
            return f"{told} Scores differ for more reasons than it.{rest}"
        if self.num_recipes < 2:
            return "Fewer than two recipes could be read: whether they differ is unknown."
        kinds = [name for name, found in (("the method", self.method), ("the seed", self.seed)) if found]
        kinds += [f"by design {_names(self.by_design)}"] if self.by_design else []
        told = f"Recipes differ in {' and '.join(kinds)} only" if kinds else "Recipes are equal"
        told += f", but for what changes nothing computed: {_names(self.neutral)}" if self.neutral else ""
        return f"{told}.{rest}"


def kind_of(name: str) -> Kind:
    """What a difference in the dotted field `name` is about, if it can change the weights and nobody intended it."""
    if name == "seed":
        return "seed"
    return "method" if name.startswith(("objective.", "optim.temperature_")) else "other"


def recipe_drift(runs: Sequence[RunFolder], by_design: Collection[str] = ()) -> Drift:
    """The drift between the recipes that could be read; `by_design` names fields that are meant to differ."""
    recipes = {run.label: run.recipe for run in runs if run.recipe is not None}
    facts = {
        label: {name: value for name, value in recipe.fields.items() if name not in PLACES}
        for label, recipe in recipes.items()
    }
    telling = {each.name for each in differences(telling_fields(runs))}
    found: dict[Kind, list[Difference]] = {kind: [] for kind in get_args(Kind)}
    for difference in differences(facts):
        kind = kind_of(difference.name) if difference.name in telling else "neutral"
        found["by_design" if kind == "other" and difference.name in by_design else kind].append(difference)
    return Drift(**found, notes=filled_notes(recipes), num_recipes=len(recipes), num_runs=len(runs))


def telling_fields(runs: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """Label -> the fields of a readable recipe that can change the weights, with values equal where they do not."""
    recipes = {run.label: run.recipe for run in runs if run.recipe is not None}
    data = _data_of_addresses(runs)
    found = {}
    for label, recipe in recipes.items():
        fields = {name: value for name, value in recipe.fields.items() if name not in NEUTRAL.union(PLACES)}
        # Only a PATH begins with other weights than the run's own.
        if fields.get("resume") in ("auto", "never"):
            del fields["resume"]
        address = repr(fields.get("data.train"))
        if address in data:
            fields["data.train"] = data[address]
        found[label] = fields
    return found


def _data_of_addresses(runs: Sequence[RunFolder]) -> dict[str, str]:
    """Written `data.train` -> fingerprint of its shards, where all runs that name it had the same."""
    prints: dict[str, set[str]] = {}
    for run in runs:
        if run.recipe is not None:
            # The fingerprint does not tell which shards belong to which source, and by weights sources count.
            told = run.shards.fingerprint if run.shards and not run.recipe.fields.get("data.weights") else ""
            prints.setdefault(repr(run.recipe.fields.get("data.train")), set()).add(told)
    return {address: told.pop() for address, told in prints.items() if len(told) == 1 and told != {""}}


def _names(found: Sequence[Difference]) -> str:
    return listed([each.name for each in found])
