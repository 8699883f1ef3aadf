"""What a run will need, worked out before it is queued: memory, traffic, time and cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuclip_scale.planning.gpus import GPU_TYPES
    from neuclip_scale.planning.measured import read_measured
    from neuclip_scale.planning.memory import MemoryPlan, plan_memory
    from neuclip_scale.planning.parts import MOMENTS, MemoryItem
    from neuclip_scale.planning.report import RunPlan, plan_run
    from neuclip_scale.planning.scaling import ScalingPlan, plan_scaling
    from neuclip_scale.planning.site import Assumptions, Measured, Site
    from neuclip_scale.planning.sweep import Sweep
    from neuclip_scale.planning.timing import StepTime, plan_time
    from neuclip_scale.planning.traffic import Transfer, plan_traffic

__all__ = [
    "GPU_TYPES",
    "MOMENTS",
    "Assumptions",
    "Measured",
    "MemoryItem",
    "MemoryPlan",
    "RunPlan",
    "ScalingPlan",
    "Site",
    "StepTime",
    "Sweep",
    "Transfer",
    "plan_memory",
    "plan_run",
    "plan_scaling",
    "plan_time",
    "plan_traffic",
    "read_measured",
]

# Loaded when asked for: the command reads its options without torch.
_HOMES = {
    "gpus": ("GPU_TYPES",),
    "measured": ("read_measured",),
    "memory": ("MemoryPlan", "plan_memory"),
    "parts": ("MOMENTS", "MemoryItem"),
    "report": ("RunPlan", "plan_run"),
    "scaling": ("ScalingPlan", "plan_scaling"),
    "site": ("Assumptions", "Measured", "Site"),
    "sweep": ("Sweep",),
    "timing": ("StepTime", "plan_time"),
    "traffic": ("Transfer", "plan_traffic"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
