"""What a run tells about itself: metrics, progress, throughput and the environment it ran in."""

from __future__ import annotations

from neuclip_scale.telemetry.environment import environment
from neuclip_scale.telemetry.logger import RunLogger
from neuclip_scale.telemetry.meter import ThroughputMeter, peak_memory_bytes

__all__ = ["RunLogger", "ThroughputMeter", "environment", "peak_memory_bytes"]
