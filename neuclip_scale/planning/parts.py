"""The parts of a rank's memory, and the moments of a step at which they are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Moment = Literal["encode", "normalizers", "similarities", "backward", "reduction", "update"]

MOMENTS: tuple[Moment, ...] = ("encode", "normalizers", "similarities", "backward", "reduction", "update")
"""Of a step in their order: first encoding; estimate of the normalizers; similarities and feature gradients; replay and
backward pass; its end, when the last gradients are reduced; the optimizer's update."""
PASSES: tuple[Moment, ...] = ("encode", "backward")
"""When the encoders run."""
LATE: tuple[Moment, ...] = ("reduction", "update")
"""When gradients are complete."""


@dataclass(frozen=True)
class MemoryItem:
    """One thing that lies in a rank's memory."""

    name: str
    device: int
    """Bytes on the device that trains."""
    host: int
    """Bytes in the host's memory instead: what is offloaded."""
    how: str
    """Where the figure comes from."""
    moments: tuple[Moment, ...] = MOMENTS
    """When it is there."""
