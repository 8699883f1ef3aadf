"""Recipes from YAML and dotted overrides, strictly, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from neuclip_scale.config.errors import ConfigError
from neuclip_scale.config.schema import Recipe

T = TypeVar("T")


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("neuclip_scale") / "recipes"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    `path` is a packaged name (`demo`, `datacomp_small`, ...) or a YAML file; `overrides` maps dotted names to values,
    or is a list of `section.field=value` strings whose values are YAML. Raises `ConfigError`; does not check what
    depends on the world size (see `check_recipe`).
    """
    values = _read_yaml(path)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split_override, overrides)
    for name, value in pairs:
        _set_dotted(values, name, value)
    return parse(Recipe, values)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse` reads it back to an equal value."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Dotted name -> plain value of every field of `recipe`."""
    return dict(flat_fields(_plain(recipe)))


def recipe_changes(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """The dotted fields that are not the same in both, with both values."""
    old, new = recipe_fields(before), recipe_fields(after)
    names = dict.fromkeys([*old, *new])
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def flat_fields(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested sections; an empty one counts as a value."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flat_fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def parse(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build dataclass `cls` from plain YAML values; unknown keys and wrong types raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known fields: {', '.join(sorted(known))}."
            raise ConfigError(f"{prefix}{key}", values[key], "there is no such field", hint)
    return cls(**{key: _coerce(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _read_yaml(path: str | Path) -> dict[str, Any]:
    data = None
    if str(path) in recipe_names():
        data = (resources.files("neuclip_scale") / "recipes" / f"{path}.yaml").read_bytes()
    elif Path(path).is_file():
        data = Path(path).read_bytes()
    if data is None:
        raise ConfigError(
            "recipe",
            str(path),
            "neither a packaged recipe nor a file",
            f"Packaged recipes: {', '.join(recipe_names())}; or give the path of a YAML file.",
        )
    try:
        values = yaml.load(data.decode("utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", str(path), f"not valid YAML in UTF-8 ({error})", "Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError("recipe", str(path), "not a mapping of sections", "Start from a packaged recipe.")
    return values


def _split_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("override", text, "not of the form section.field=value", "Write train.num_steps=100, say.")
    try:
        # Nothing after the sign is the empty text, as in evaluation.data= for no evaluation; YAML's null fits no field.
        return name.strip(), yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(name.strip(), value, "not a YAML value", "Quote text with special characters.") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _set_dotted(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(name, value, f"{section} is not a section", "See `neuclip train --help`.")
    values[last] = value


def _coerce(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(name, value, "a section must be a mapping of fields", "Indent its fields below it.")
        return parse(hint, value, prefix=f"{name}.")
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):  # 1 is no True
            raise ConfigError(name, value, "not one of the choices", f"Choose from {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (Ellipsis not in arguments and len(value) != len(arguments)):
            raise ConfigError(name, value, "wrong type or length", f"Expected {_describe(hint)}, as [a, b].")
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else arguments
        return tuple(
            _coerce(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(name, value, "not a mapping of names", f"Expected {_describe(hint)}.")
        return {key: _coerce(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 (without a point) as text.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(name, value, f"has type {type(value).__name__}", f"Give {_describe(hint)}.")


def _describe(hint: Any) -> str:
    if isinstance(hint, (types.GenericAlias, typing._GenericAlias)):  # type: ignore[attr-defined]
        return str(hint).replace("typing.", "")
    words = {int: "a whole number", float: "a number", str: "text (quote it)", bool: "true or false"}
    return words.get(hint, str(hint))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
