"""What a run will need, worked out before it is queued: memory, traffic, time and cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuclip_scale.planning.gpus import GPU_TYPES
    from neuclip_scale.planning.memory import MemoryPlan, plan_memory
    from neuclip_scale.planning.parts import MOMENTS, MemoryItem
    from neuclip_scale.planning.report import RunPlan, plan_run
    from neuclip_scale.planning.site import Assumptions, Site
    from neuclip_scale.planning.timing import StepTime, plan_time
    from neuclip_scale.planning.traffic import Transfer, plan_traffic

__all__ = [
    "GPU_TYPES",
    "MOMENTS",
    "Assumptions",
    "MemoryItem",
    "MemoryPlan",
    "RunPlan",
    "Site",
    "StepTime",
    "Transfer",
    "plan_memory",
    "plan_run",
    "plan_time",
    "plan_traffic",
]

# Loaded when asked for: the command reads its options without torch.
_HOMES = {
    "gpus": ("GPU_TYPES",),
    "memory": ("MemoryPlan", "plan_memory"),
    "parts": ("MOMENTS", "MemoryItem"),
    "report": ("RunPlan", "plan_run"),
    "site": ("Assumptions", "Site"),
    "timing": ("StepTime", "plan_time"),
    "traffic": ("Transfer", "plan_traffic"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
