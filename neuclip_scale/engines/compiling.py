"""Whether torch.compile makes the towers' programs, where a recipe leaves that to the machine."""

from __future__ import annotations

import logging

import torch

from neuclip_scale import distributed
from neuclip_scale.config import Recipe
from neuclip_scale.engines.zero_settings import IN_ZERO3, read_settings, zero_stage
from neuclip_scale.models.presets import ResNetConfig, preset_of
from neuclip_scale.similarity.choosing import MIN_CAPABILITY

REMEDY = "Have a C compiler and Python's headers: on Debian and Ubuntu the packages gcc and python3-dev."

log = logging.getLogger(__name__)


def compiles_everywhere(config: Recipe, device: torch.device) -> bool:
    """What `model.compile` comes to on all ranks' devices: `auto` is no where one of them says so (collective)."""
    decided = distributed.gather_objects(compiles(config, device))
    if len(set(decided)) > 1:
        against = ", ".join(str(rank) for rank, yes in enumerate(decided) if not yes)
        log.warning("towers are compiled on no rank, for these cannot and their logs say why: %s", against)
    return all(decided)


def compiles(config: Recipe, device: torch.device) -> bool:
    """What `model.compile` comes to on a device; of `auto` it says why in the log."""
    if config.model.compile != "auto":
        return config.model.compile
    reason = _reason_against(config, device)
    log.info("towers on %s are %s", device, f"not compiled: {reason}" if reason else "compiled")
    return not reason


def _reason_against(config: Recipe, device: torch.device) -> str:
    """Why towers run as they are; empty if nothing speaks for it."""
    if device.type != "cuda":
        return "that was measured to pay on GPUs alone"
    section = config.model
    if section.image_tower or section.text_tower or isinstance(preset_of(section).image, ResNetConfig):
        return "that was measured for CLIP's own transformers alone"
    if config.engine.name == "deepspeed" and zero_stage(read_settings(config.engine.deepspeed.config)) == 3:
        return IN_ZERO3
    if torch.version.hip:
        return "that was never tried with ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return compiler_fault(device)


def compiler_fault(device: torch.device) -> str:
    """What is wrong with torch.compile on this machine; empty if a small function runs."""
    try:
        x = torch.arange(8.0, device=device)
        right = torch.allclose(torch.compile(_trial, dynamic=False)(x), _trial(x))
    except Exception as error:  # whatever a compiler or driver raises: a run must not end for want of a faster program
        told = "torch.compile does not run here, and without it towers take 1.3 to 1.4 times as long. %s"
        log.warning(told, REMEDY, exc_info=True)
        return f"torch.compile does not run here ({type(error).__name__})"
    return "" if right else "torch.compile's programs are wrong here"


def _trial(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + 1
