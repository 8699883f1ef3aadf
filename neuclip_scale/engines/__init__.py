"""How the encoders are spread over the ranks; engines know nothing of losses."""

from neuclip_scale.engines.base import Engine
from neuclip_scale.engines.registry import create_engine

__all__ = ["Engine", "create_engine"]
