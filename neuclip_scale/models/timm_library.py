"""The way to timm: towers, optimizers and resampled positions all come through here, when they are asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_timm(field: str) -> ModuleType:
    """timm with the parts used here; ImportError says which recipe field needs it."""
    try:
        timm = import_module("timm")
        for part in ("layers", "models", "optim"):
            import_module(f"timm.{part}")
    except ImportError as error:
        raise ImportError(f"{field} needs timm ({error}): pip install 'timm>=1.0.20'.") from error
    return timm
