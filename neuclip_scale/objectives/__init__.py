"""Training objectives: thin combinations of a log-normalizer estimate with the one tiled gradient."""

from neuclip_scale.objectives.base import Objective, ObjectiveOutput
from neuclip_scale.objectives.registry import create_objective

__all__ = ["Objective", "ObjectiveOutput", "create_objective"]
