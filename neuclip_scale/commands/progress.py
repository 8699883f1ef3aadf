"""Progress of commands that work through many files, as plain lines that also serve in a log."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 10


class ProgressLines:
    """Prints each stage when it begins, and every ten seconds how far it is, to stderr."""

    def __init__(self, unit: str) -> None:
        """`unit`: what is counted, as shards."""
        self._unit, self._stage, self._told = unit, "", 0.0

    def __call__(self, stage: str, done: int, whole: int) -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._stage, self._told = stage, now
        print(f"{stage}: {done:,} of {whole:,} {self._unit}" if whole else stage, file=sys.stderr, flush=True)
