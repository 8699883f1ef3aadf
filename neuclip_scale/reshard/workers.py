"""Work on several processes, results in order, bounded memory, and no process left behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from neuclip_scale.reshard.errors import ReshardError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that end with this one, however it ends; None for a single worker, which is this process."""
    if num_workers == 1:
        yield None
        return
    # Forking would copy pyarrow's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ReshardError(
            "a worker was killed, most likely for want of memory. Run the same command again with fewer --num-workers, "
            "it goes on."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ordered(
    pool: ProcessPoolExecutor | None, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`function` of each item, in their order, with at most `ahead` items begun and not yet taken."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _end_with_parent(parent: int) -> None:
    """Let the kernel end this worker when its parent dies: else it would go on writing beside the next run's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
