"""A limit on what one decoding process may hold, kept by the process itself."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import psutil

GIBIBYTE = 1 << 30


class WorkerMemoryError(RuntimeError):
    """A decoding process grew above `data.max_worker_memory_gib`, and letting its caches go did not help."""


class MemoryLimit:
    """Measures what this process has come to hold since this was made: pages of its own, not those it was forked with.

    A limit set on the address space (RLIMIT_AS) would break torch, and the kernel's own kills without a word.
    """

    def __init__(self, limit_gib: float, drop_caches: Callable[[], None]) -> None:
        """0 sets no limit."""
        self._limit, self._drop_caches = limit_gib * GIBIBYTE, drop_caches
        if self._limit:
            _return_free_memory()  # what the process was forked with and no longer uses would hide as much growth
        self._at_start = _private_bytes() if self._limit else 0

    def check(self, activity: str) -> None:
        """Let caches go when above the limit; raises `WorkerMemoryError` if the process is still above it."""
        if not self._limit or self._grown() <= self._limit:
            return
        self._drop_caches()
        _return_free_memory()
        if (grown := self._grown()) > self._limit:
            raise WorkerMemoryError(
                f"worker process {os.getpid()} has come to hold {grown / GIBIBYTE:.2f} GiB, more than "
                f"data.max_worker_memory_gib = {self._limit / GIBIBYTE:g}, {activity}. The same command resumes from "
                "the newest checkpoint: raise the limit, or lower data.max_image_pixels, data.num_streams, "
                "data.shuffle_window or data.prefetch_batches."
            )

    def _grown(self) -> int:
        return _private_bytes() - self._at_start


def _private_bytes() -> int:
    """Resident bytes, without files and memory shared with other processes where the system tells them apart."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def _return_free_memory() -> None:
    """glibc keeps what was freed; other C libraries have no such call."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
