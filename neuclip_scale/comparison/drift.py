"""What the recipes of runs differ in: the method, the seed, or more than that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from neuclip_scale.comparison.differences import Difference, differences
from neuclip_scale.comparison.recipe_file import filled_notes
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.text import listed

IGNORED = ("run_dir", "name")
"""Fields that tell runs apart and change nothing."""

Kind = Literal["method", "seed", "other"]


@dataclass(frozen=True)
class Drift:
    """Recipe fields that differ, sorted by what they make of a comparison."""

    method: list[Difference] = field(default_factory=list)
    """`objective.*` and `optim.temperature_*`: what a comparison of methods is about."""
    seed: list[Difference] = field(default_factory=list)
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
            names = listed([each.name for each in self.other])
            return f"Recipes differ in more than the method: {names}. Scores differ for more reasons than it.{rest}"
        if self.num_recipes < 2:
            return "Fewer than two recipes could be read: whether they differ is unknown."
        kinds = [name for name, found in (("the method", self.method), ("the seed", self.seed)) if found]
        return (f"Recipes differ in {' and '.join(kinds)} only." if kinds else "Recipes are equal.") + rest


def kind_of(name: str) -> Kind:
    """What a difference in the dotted field `name` is about."""
    if name == "seed":
        return "seed"
    return "method" if name.startswith(("objective.", "optim.temperature_")) else "other"


def recipe_drift(runs: Sequence[RunFolder]) -> Drift:
    """The drift between the recipes that could be read."""
    recipes = {run.label: run.recipe for run in runs if run.recipe is not None}
    facts = {
        label: {name: value for name, value in recipe.fields.items() if name not in IGNORED}
        for label, recipe in recipes.items()
    }
    drift = Drift(notes=filled_notes(recipes), num_recipes=len(recipes), num_runs=len(runs))
    for difference in differences(facts):
        {"method": drift.method, "seed": drift.seed, "other": drift.other}[kind_of(difference.name)].append(difference)
    return drift
