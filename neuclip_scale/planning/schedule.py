"""A step as two queues that run side by side: the GPU computes in order, the network sends in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Span = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """One piece of work; it begins when its queue is free and what it needs is done."""

    seconds: float
    needs: tuple[int, ...] = ()
    """Places of earlier tasks in the list."""
    sends: str = ""
    """Name of the collective that it is a part of; empty where the GPU computes."""


@dataclass(frozen=True)
class Schedule:
    """When all is done, and for what the GPU has waited."""

    seconds: float
    computing: float
    """Sum of the computing tasks; the rest is waiting."""
    waits: dict[str, float]
    """Seconds in which the GPU stood still, by the collective that was under way."""


def run(tasks: Sequence[Task]) -> Schedule:
    """Play the tasks in their order; O(n).

    While the GPU stands still the network is never idle: what it sends next needs computation that is done. So every
    wait has a name, and computing + waits = seconds.
    """
    ends: list[float] = []
    idle: list[Span] = []
    sent: list[tuple[Span, str]] = []
    computed = network = 0.0
    for task in tasks:
        begin = max(network if task.sends else computed, *(ends[place] for place in task.needs), 0.0)
        end = begin + task.seconds
        ends.append(end)
        if task.sends:
            sent.append(((begin, end), task.sends))
            network = end
        else:
            idle.append((computed, begin))
            computed = end
    idle.append((computed, max(computed, network)))
    waits: dict[str, float] = {}
    for name, seconds in _charged(idle, sent):
        waits[name] = waits.get(name, 0.0) + seconds
    computing = sum(task.seconds for task in tasks if not task.sends)
    return Schedule(max(computed, network), computing, waits)


def _charged(idle: Sequence[Span], sent: Sequence[tuple[Span, str]]) -> Iterator[tuple[str, float]]:
    """What of each sending falls into idle time; both lists are in order and do not overlap themselves."""
    first = 0
    for (begin, end), name in sent:
        while first < len(idle) and idle[first][1] <= begin:
            first += 1
        place = first
        while place < len(idle) and idle[place][0] < end:
            seconds = min(end, idle[place][1]) - max(begin, idle[place][0])
            if seconds > 0:
                yield name, seconds
            place += 1
