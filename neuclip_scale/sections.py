"""Where the time of a step goes, by named sections of the code.

    with StepTimer(device) as timer:
        with section("npn/update"):
            ...
    timer.seconds()  # {"npn/update": ..., "other": ...}

Outside a `StepTimer` a section measures nothing and costs about half a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from functools import cache

import torch

OTHER = "other"
"""Time of a step that no section claims."""
_LEFT_OUT = "left out"


class StepTimer:
    """Splits the time of its `with` block among the sections entered inside it.

    Time belongs to the innermost section, so nothing counts twice and the parts, `OTHER` included, add up to the
    whole. On a CPU it is wall time. On a GPU it is time of the current stream between CUDA events: a section gets the
    work it queued, not the time it took to queue it, and nothing waits for the GPU before `seconds`.

    One timer runs at a time, on the thread that runs the step; sections on other threads must not exist.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inside = [OTHER]
        self._stamps: list[float | torch.cuda.Event] = []
        self._owners: list[str] = []  # of the time between each stamp and the next

    def __enter__(self) -> StepTimer:
        global _running
        _running = self
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        global _running
        _running = None
        self._mark()

    def enter(self, name: str) -> None:
        """Charge the time from now on to `name`."""
        self._inside.append(name)
        self._mark()

    def leave(self) -> None:
        """Charge the time from now on to the section around the innermost one."""
        self._inside.pop()
        self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds of every section that was entered, and of `OTHER`, once the `with` block is over.

        On a GPU this waits for the last event. Where the host has a result that was copied inside the block, it waits
        for nothing.
        """
        totals: dict[str, float] = {}
        if isinstance(self._stamps[-1], torch.cuda.Event):
            self._stamps[-1].synchronize()
        for name, begin, end in zip(self._owners, self._stamps, self._stamps[1:], strict=False):
            totals[name] = totals.get(name, 0.0) + _elapsed(begin, end)
        totals.pop(_LEFT_OUT, None)
        return totals

    def _mark(self) -> None:
        self._owners.append(self._inside[-1])
        if self._device.type != "cuda":
            self._stamps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._stamps.append(event)


_running: StepTimer | None = None


def _elapsed(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1000  # events count milliseconds
    assert not isinstance(end, torch.cuda.Event)
    return end - begin


class Section(ContextDecorator):
    """A named part of a step, as a `with` block or as a decorator; keeps no state, so it may nest and recur."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Section:
        if _running is not None:
            _running.enter(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        if _running is not None:
            _running.leave()


def running_place() -> tuple[str, int]:
    """Name of the innermost section of the step that runs (empty where none does), and how many times the step has
    passed from one section to another; any thread may ask."""
    timer = _running
    return (timer._inside[-1], len(timer._owners)) if timer is not None else ("", 0)


@cache
def section(name: str) -> Section:
    """The section called `name`; a name may have a folder, as `npn/update`."""
    return Section(name)


@contextmanager
def left_out() -> Iterator[None]:
    """What happens inside is no part of the step: its time goes to nobody, that of sections in it included."""
    global _running
    timer, _running = _running, None
    if timer is not None:
        timer.enter(_LEFT_OUT)
    try:
        yield
    finally:
        if timer is not None:
            timer.leave()
        _running = timer
