"""Engines by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from neuclip_scale.config import ConfigError
from neuclip_scale.engines.base import Engine
from neuclip_scale.engines.ddp import DDPEngine
from neuclip_scale.models.clip import CLIP

ENGINES: dict[str, Callable[[CLIP, torch.optim.Optimizer, torch.device, str], Engine]] = {"ddp": DDPEngine}


def create_engine(
    name: str, model: CLIP, optimizer: torch.optim.Optimizer, device: torch.device, precision: str
) -> Engine:
    """Build an engine around a model already on `device` (collective)."""
    if name not in ENGINES:
        raise ConfigError("engine.name", name, "no such engine", f"Choose from {', '.join(ENGINES)}.")
    return ENGINES[name](model, optimizer, device, precision)
