"""The JSON that other libraries write beside weights. It is downloaded like these, so anything may stand in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from neuclip_scale.config import ConfigError
from neuclip_scale.models.presets import Preset

T = TypeVar("T")


def read_json(path: Path, meaning: Callable[[Any], T]) -> T:
    """What `meaning` makes of the file; raises ValueError, with the path, where that is nothing.

    A `ConfigError`, which `meaning` raises for what it understands and has no counterpart of, stays as it is.
    """
    try:
        return meaning(json.loads(path.read_bytes()))
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        kind = type(error).__name__
        raise ValueError(f"{path}: not the configuration of a CLIP model ({kind}: {error}). Fetch it again.") from error


def checked(preset: Preset) -> Preset:
    """`preset` itself; raises ValueError for a size that is no positive integer, and for other than three channels."""
    sizes = {"embed_dim": preset.embed_dim, "image_size": preset.image_size, **vars(preset.image), **vars(preset.text)}
    for name, value in [*vars(preset.image).items(), *sizes.items()]:
        if any(type(size) is not int or size < 1 for size in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is {value!r}")
    for name, channels in (("mean", preset.image_mean), ("std", preset.image_std)):
        if len(channels) != 3 or not all(isinstance(each, (int, float)) for each in channels):
            raise ValueError(f"{name} is {channels!r}")
    return preset
