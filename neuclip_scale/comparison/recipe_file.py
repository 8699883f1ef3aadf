"""A run's config.yaml as dotted fields, also where another version of this package wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neuclip_scale.config import ConfigError, flat_fields, load_recipe, recipe_fields
from neuclip_scale.untrusted_text import listed, plain, printable

_MAX_DEPTH = 20


@dataclass(frozen=True)
class RecipeFile:
    """The resolved recipe of a run."""

    fields: dict[str, Any]
    """Dotted name -> plain value."""
    filled: tuple[str, ...]
    """Fields the file does not have, as it is older; they hold this version's defaults."""


def read_recipe(path: Path) -> tuple[RecipeFile, list[str]]:
    """The recipe in `path`, and what is wrong with it.

    A field that this version does not know is no reason to refuse the run: the fields are then compared as they are
    written. Raises OSError, and ValueError for a file that is no YAML mapping.
    """
    written = _written_fields(path)
    try:
        recipe = load_recipe(path)
    except ConfigError as error:
        problem = printable(str(error))[:300]
        return RecipeFile(written, ()), [f"{printable(str(path))}: {problem} The fields are compared as written there."]
    resolved = plain(recipe_fields(recipe))
    return RecipeFile(resolved, tuple(name for name in resolved if name not in written)), []


def filled_notes(recipes: Mapping[str, RecipeFile]) -> list[str]:
    """What to say of recipes older than this version; `recipes` maps labels to them."""
    by_fields: dict[tuple[str, ...], list[str]] = {}
    for label, recipe in recipes.items():
        if recipe.filled:
            by_fields.setdefault(recipe.filled, []).append(label)
    return [
        f"{listed(labels)}: older than these fields, here at today's defaults: {listed(list(names), most=4)}."
        for names, labels in by_fields.items()
    ]


def _written_fields(path: Path) -> dict[str, Any]:
    text = path.read_bytes().decode("utf-8")
    try:
        _check_shape(text)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("not a mapping of sections")
    return dict(flat_fields(plain(values)))


def _check_shape(text: str) -> None:
    """Raise ValueError for what a resolved recipe never has and a few kilobytes can stall or fill a machine with."""
    depth = 0
    for event in yaml.parse(text):
        # A list of aliases of lists of aliases is exponentially long once printed.
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("has YAML aliases, which a resolved recipe never has")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:  # PyYAML takes quadratic time over nested lists
                raise ValueError(f"more than {_MAX_DEPTH} levels deep, which a recipe never is")
        depth -= isinstance(event, yaml.CollectionEndEvent)
