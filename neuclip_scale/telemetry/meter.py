"""Speed and memory of a run."""

from __future__ import annotations

import resource
import sys
from collections import deque


class ThroughputMeter:
    """Samples per second and waiting for data over the last `window` steps.

    Sums over the window, not a mean of rates, so that one slow step weighs as much as it took.
    """

    def __init__(self, window: int = 50) -> None:
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=window)

    def update(self, samples: int, step_time: float, data_time: float) -> None:
        """Add a step of `samples` pairs: its seconds, and those that the host waited for its batch."""
        self._steps.append((samples, step_time, data_time))

    @property
    def samples_per_second(self) -> float:
        """Pairs per second over the window; 0 before the first step."""
        seconds = self._seconds
        return sum(samples for samples, _, _ in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def step_time(self) -> float:
        """Mean seconds per step over the window; 0 before the first step."""
        return self._seconds / len(self._steps) if self._steps else 0.0

    @property
    def data_wait_share(self) -> float:
        """Fraction of the window that the host waited for data, 0 to 1: behind a GPU's back it costs nothing."""
        seconds = self._seconds
        # A wait can be longer than its own step: its batch is loaded while the step before runs.
        return min(1.0, sum(data for _, _, data in self._steps) / seconds) if seconds > 0 else 0.0

    @property
    def _seconds(self) -> float:
        return sum(step for _, step, _ in self._steps)


def peak_memory_bytes() -> int:
    """Most memory held so far: allocated on this process's GPU if it uses one, else resident."""
    torch = sys.modules.get("torch")  # a process that never loaded torch has nothing on a GPU
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
