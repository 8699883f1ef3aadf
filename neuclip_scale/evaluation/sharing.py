"""One evaluation divided among ranks: whole batches of the same samples, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from neuclip_scale import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The batches that fall to one rank: number k to rank k modulo `world_size`."""

    rank: int = 0
    world_size: int = 1

    def owns(self, batch: int) -> bool:
        """Whether batch number `batch` is of this share."""
        return batch % self.world_size == self.rank


ALL = Share()
"""All batches: one process, or ranks that each do everything because a forward pass needs them all."""


def my_share() -> Share:
    """This rank's share of a work that all ranks divide."""
    return Share(distributed.rank(), distributed.world_size())


def gather_shares(share: Share, work: Callable[[], T]) -> list[T]:
    """What `work` returned on each rank, in rank order, on every rank (collective, unless `share` is all).

    `work` holds no collective. An error of one rank is raised on every rank: none waits for another that has left.
    Results travel pickled: give arrays, not tensors of a device.
    """
    if share.world_size == 1:
        return [work()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    gathered = distributed.gather_objects((result, failure))
    for _, raised in gathered:
        if raised is not None:
            raise raised
    return [part for part, _ in gathered]  # type: ignore[misc]


def agree(share: Share, work: Callable[[], T]) -> T:
    """What `work` returned here, if it succeeded on every rank; else its error, on every rank (collective, unless
    `share` is all). For what each rank must do itself, such as opening a file that another node may not see.
    """
    mine: list[T] = []
    gather_shares(share, lambda: mine.append(work()))  # the result itself stays: it may be no thing to send
    return mine[0]
