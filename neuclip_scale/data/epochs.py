"""Proof that an epoch was one: every sample read exactly once, over all ranks and through every resumption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_MASK = (1 << 64) - 1

Sums = tuple[int, int, int]
"""Samples, the sum of their indices, and the sum of the indices' squares, each modulo 2**64."""


class EpochLedger:
    """Sums over the samples read in each epoch that is not yet closed.

    Sums of different ranks add up, and fit in a checkpoint; that n indices below n with the right sums of first and
    second powers are not 0 .. n - 1 takes at least three errors that cancel.
    """

    def __init__(self) -> None:
        self.open: dict[int, Sums] = {}

    def add(self, epoch: int, sample_index: int) -> None:
        """Note one sample that was read, usable or not."""
        self.merge({epoch: (1, sample_index, sample_index * sample_index)})

    def merge(self, sums: Mapping[int, Sums]) -> None:
        """Add what another ledger has noted."""
        for epoch, (count, first, second) in sums.items():
            own = self.open.get(epoch, (0, 0, 0))
            self.open[epoch] = own[0] + count, (own[1] + first) & _MASK, (own[2] + second) & _MASK

    def close(self, epoch: int) -> Sums:
        """Take an epoch's sums out."""
        return self.open.pop(epoch, (0, 0, 0))


def joined(parts: Iterable[Mapping[int, Sums]]) -> dict[int, Sums]:
    """The sums of all ranks."""
    ledger = EpochLedger()
    for part in parts:
        ledger.merge(part)
    return ledger.open


def whole_epoch(num_samples: int) -> Sums:
    """The sums of the samples 0 .. num_samples - 1, each once."""
    n = num_samples
    return n, (n * (n - 1) // 2) & _MASK, (n * (n - 1) * (2 * n - 1) // 6) & _MASK
