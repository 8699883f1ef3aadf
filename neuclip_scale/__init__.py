"""Train CLIP with the global contrastive loss and a normalizer-prediction network, from a laptop to Slurm.

The public names below are loaded on first use, so that `import neuclip_scale` and `neuclip --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuclip_scale.config import ConfigError, Recipe, load_recipe
    from neuclip_scale.losses import create_loss
    from neuclip_scale.models.building import build_model
    from neuclip_scale.models.loading import load_pretrained
    from neuclip_scale.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Recipe",
    "Trainer",
    "__version__",
    "build_model",
    "create_loss",
    "load_pretrained",
    "load_recipe",
]

_HOMES = {
    "ConfigError": "neuclip_scale.config",
    "Recipe": "neuclip_scale.config",
    "load_recipe": "neuclip_scale.config",
    "create_loss": "neuclip_scale.losses",
    "build_model": "neuclip_scale.models.building",
    "load_pretrained": "neuclip_scale.models.loading",
    "Trainer": "neuclip_scale.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
