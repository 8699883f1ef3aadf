"""Parameter groups, AdamW, and learning rates as stateless functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from neuclip_scale.config import OptimConfig

TEMPERATURE_DROP = 1 / 3
"""Factor on tau's learning rate once tau is small (FastCLIP, arXiv 2407.01445)."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], section: OptimConfig
) -> list[dict[str, object]]:
    """Three groups, `name` decay, no_decay and temperature, each with its peak learning rate in `peak_lr`.

    Weight decay goes to tensors of two and more dimensions outside norms, as in open_clip; logit_scale and
    logit_bias have their own group without it.
    """
    decay, no_decay, temperature = [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if name in ("logit_scale", "logit_bias"):
            temperature.append(parameter)
        elif parameter.ndim < 2:
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    rate = section.learning_rate
    groups: list[dict[str, object]] = [
        {"name": "decay", "params": decay, "weight_decay": section.weight_decay, "peak_lr": rate},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0, "peak_lr": rate},
        {
            "name": "temperature",
            "params": temperature,
            "weight_decay": 0.0,
            "peak_lr": section.temperature_learning_rate or rate,
        },
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(model: nn.Module, section: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; fused on GPUs."""
    groups = parameter_groups(model.named_parameters(), section)
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=on_gpu)


def schedule_factor(step: int, num_steps: int, section: OptimConfig) -> float:
    """Factor on the peak learning rate at `step` (0-based): linear warm-up, then cosine to zero or constant."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return 1.0
    progress = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, factor: float, *, constant_temperature: bool, temperature_dropped: bool
) -> None:
    """Apply the schedule to every group, to tau's unless it is constant; tau's falls to a third once it was small."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"]
        if group["name"] != "temperature":
            group["lr"] = rate * factor
            continue
        drop = TEMPERATURE_DROP if temperature_dropped else 1.0
        group["lr"] = rate * drop * (1.0 if constant_temperature else factor)
