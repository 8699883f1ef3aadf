"""Engines by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from neuclip_scale.config import Recipe
from neuclip_scale.engines.base import Engine
from neuclip_scale.models.clip import CLIP


def _ddp(model: CLIP, config: Recipe, device: torch.device) -> Engine:
    from neuclip_scale.engines.ddp import DDPEngine

    return DDPEngine(model, config, device)


def _fsdp2(model: CLIP, config: Recipe, device: torch.device) -> Engine:
    from neuclip_scale.engines.fsdp2 import FSDP2Engine

    return FSDP2Engine(model, config, device)


def _deepspeed(model: CLIP, config: Recipe, device: torch.device) -> Engine:
    from neuclip_scale.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config, device)


# Imported when chosen: DeepSpeed is an extra, and takes seconds to import.
ENGINES: dict[str, Callable[[CLIP, Recipe, torch.device], Engine]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "deepspeed": _deepspeed,
}


def create_engine(model: CLIP, config: Recipe, device: torch.device) -> Engine:
    """Build the engine a recipe names around a model on the CPU or planned on the meta device, and its optimizer
    (collective).

    The model's parameters may be replaced by sharded ones, on `device`. Raises `ConfigError`.
    """
    engine = ENGINES[config.engine.name](model, config, device)
    if config.optim.ema_decay:
        engine.start_average(config.optim.ema_decay)
    return engine
