"""Parameter groups, optimizers, and learning rates as stateless functions of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from neuclip_scale.config import ConfigError, OptimConfig
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.layers import parameter_layers
from neuclip_scale.models.timm_library import import_timm

TEMPERATURE_DROP = 1 / 3
"""Factor on tau's learning rate once tau is small (FastCLIP, arXiv 2407.01445)."""

TEMPERATURE = "temperature"
"""Name of the group of logit_scale and logit_bias."""


def parameter_groups(model: CLIP, section: OptimConfig) -> list[dict[str, Any]]:
    """Groups of trained parameters with `name`, `weight_decay`, and their peak learning rate in `peak_lr`.

    Weight decay goes to tensors of two and more dimensions outside norms, as in open_clip; logit_scale and
    logit_bias have their own group without it. Towers and layers that differ in neither share a group.
    """
    layers = parameter_layers(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    temperature = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in layers:
            temperature.append(parameter)
            continue
        layer = layers[name]
        tower = section.image if layer.tower == "image" else section.text
        rate = section.learning_rate * tower.learning_rate_factor * tower.layer_decay ** (layer.last - layer.number)
        # Under ZeRO 3 the parameter itself is empty.
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        decay = section.weight_decay * tower.weight_decay_factor if is_matrix else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "weight_decay": decay, "peak_lr": rate})
        group["params"].append(parameter)
    found = [{"name": f"encoders {number}", **group} for number, group in enumerate(groups.values())]
    rate = section.temperature_learning_rate or section.learning_rate
    return [*found, {"name": TEMPERATURE, "params": temperature, "weight_decay": 0.0, "peak_lr": rate}]


def create_optimizer(model: CLIP, section: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer `section.name` over `parameter_groups`; raises `ConfigError` for one that cannot be used."""
    return optimizer_over(parameter_groups(model, section), section)


def optimizer_over(groups: list[dict[str, Any]], section: OptimConfig) -> torch.optim.Optimizer:
    """The same over any groups."""
    if section.name == "adamw":
        # One pass over memory, and no look at the step counts by the host: a quarter of the time, on a CPU too.
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)
    library = import_timm(f"optim.name={section.name}").optim
    known = [str(name) for name in library.list_optimizers()]
    if section.name not in known:
        remedy = f"Choose adamw or one of timm's: {', '.join(known)}."
        raise ConfigError("optim.name", section.name, "timm has no such optimizer", remedy)
    if section.name.startswith("kron"):
        raise ConfigError(
            "optim.name", section.name, "what it keeps are lists, which no checkpoint here holds", "Choose another."
        )
    info = library.get_optimizer_info(section.name)
    if info.second_order:
        raise ConfigError(
            "optim.name", section.name, "it needs second derivatives, which no engine here makes", "Choose another."
        )
    options: dict[str, Any] = {}
    if info.has_betas and info.num_betas == 2:
        options["betas"] = section.betas
    if info.has_eps:
        options["eps"] = section.eps
    if info.has_momentum:
        options["momentum"] = section.momentum
    try:
        made: torch.optim.Optimizer = library.create_optimizer_v2(
            groups, section.name, lr=section.learning_rate, weight_decay=0.0, filter_bias_and_bn=False, **options
        )
    except (AssertionError, ImportError) as error:  # of a third library, apex or bitsandbytes, which timm asks for
        problem = f"it cannot be made here ({error})"
        raise ConfigError("optim.name", section.name, problem, "Choose another; adamw is fused as it is.") from error
    return made


def schedule_factor(step: int, num_steps: int, section: OptimConfig) -> float:
    """Factor on the peak learning rate at `step` (0-based) of `num_steps`: linear warm-up, then the schedule."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return 1.0
    if section.schedule == "cooldown":
        rest = (num_steps - step) / (section.cooldown_steps + 1)
        return float(min(1.0, max(0.0, rest)) ** section.cooldown_power)
    progress = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, factor: float, *, constant_temperature: bool, temperature_dropped: bool
) -> None:
    """Apply the schedule to every group, to tau's unless it is constant; tau's falls to a third once it was small."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"]
        if group["name"] != TEMPERATURE:
            group["lr"] = rate * factor
            continue
        drop = TEMPERATURE_DROP if temperature_dropped else 1.0
        group["lr"] = rate * drop * (1.0 if constant_temperature else factor)
