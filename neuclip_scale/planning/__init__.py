"""What a run will need, worked out before it is queued: memory, traffic, time and cost."""

from neuclip_scale.planning.budget import Budget
from neuclip_scale.planning.choosing import Choice, Option, choose
from neuclip_scale.planning.gpus import GPU_TYPES, GpuType
from neuclip_scale.planning.memory import MemoryPlan, plan_memory
from neuclip_scale.planning.parts import MOMENTS, MemoryItem
from neuclip_scale.planning.report import RunPlan, plan_run
from neuclip_scale.planning.site import Assumptions, Site, check_site
from neuclip_scale.planning.timing import StepTime, plan_time
from neuclip_scale.planning.traffic import Transfer, plan_traffic

__all__ = [
    "GPU_TYPES",
    "MOMENTS",
    "Assumptions",
    "Budget",
    "Choice",
    "GpuType",
    "MemoryItem",
    "MemoryPlan",
    "Option",
    "RunPlan",
    "Site",
    "StepTime",
    "Transfer",
    "check_site",
    "choose",
    "plan_memory",
    "plan_run",
    "plan_time",
    "plan_traffic",
]
