"""Several sources in given proportions, in an order as fixed and as directly found as that of one.

Each source keeps streams of its own. The positions of a mixed stream come in blocks of 4096: how many of a block each
source fills follows from the weights alone, which of them from a permutation by (seed, stream, block). So the number
of samples a source has given before any position is known without walking there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from neuclip_scale.config import ConfigError, DataConfig
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.streams import StreamOrder, seeded_permutation

BLOCK = 4096
_MIXTURE = 5  # first word of the seed, see data.streams
_UNIT = 1 << 32  # shares are whole numbers of this, so that no platform rounds them otherwise


class MixedOrder:
    """Streams that take from several `StreamOrder`s by weight; the interface of a `StreamOrder`."""

    whole_epochs = False

    def __init__(self, orders: Sequence[StreamOrder], weights: Sequence[float], seed: int) -> None:
        """`weights` are relative, at least 1/2048 of their sum each."""
        self.num_streams = orders[0].num_streams
        self.num_samples = sum(order.num_samples for order in orders)
        self._orders = orders
        self._seed = seed % (1 << 64)
        ends = np.cumsum(np.asarray(weights, dtype=np.float64))
        self._ends = [0, *(round(end / ends[-1] * _UNIT) for end in ends.tolist())]
        small = [i for i, (low, high) in enumerate(pairwise(self._ends)) if (high - low) * BLOCK < 2 * _UNIT]
        if small:
            raise ConfigError(
                "data.weights",
                list(weights),
                f"source {small[0] + 1} has less than 1/{BLOCK // 2} of the sum, too little to be mixed in",
                "Raise its weight, or leave the source out.",
            )

    def length(self, stream: int) -> int:
        """Samples of one stream in all sources."""
        return sum(order.length(stream) for order in self._orders)

    def epoch_of(self, stream: int, position: int) -> int:
        """How often the stream could have read all its samples at `position`."""
        return position // self.length(stream)

    def taken(self, stream: int, position: int) -> list[int]:
        """Samples each source has given to the stream before `position`."""
        block, inside = divmod(position, BLOCK)
        labels = self._labels(stream, block)[:inside] if inside else np.zeros(0, dtype=np.int64)
        counts = np.bincount(labels, minlength=len(self._orders)).tolist()
        return [self._before(source, block) + count for source, count in enumerate(counts)]

    def read_of_each(self, positions: Sequence[int]) -> list[int]:
        """Samples each source has given to all streams, which stand at `positions`."""
        return [sum(counts) for counts in zip(*map(self.taken, range(self.num_streams), positions), strict=True)]

    @property
    def samples_of_each(self) -> list[int]:
        """Samples that each source has."""
        return [order.num_samples for order in self._orders]

    def walk(self, stream: int, position: int = 0) -> Iterator[int]:
        """Dense sample indices from `position` on, without end."""
        starts = self.taken(stream, position)
        walks = [order.walk(stream, start) for order, start in zip(self._orders, starts, strict=True)]
        block, skip = divmod(position, BLOCK)
        while True:
            for source in self._labels(stream, block)[skip:].tolist():
                yield next(walks[source])
            block, skip = block + 1, 0

    def count_reads(self, positions: Sequence[int], times: np.ndarray) -> None:
        """Add to `times` [n] how often each dense sample index was read when the streams stand at `positions`."""
        taken = [self.taken(stream, position) for stream, position in enumerate(positions)]
        for order, counts in zip(self._orders, zip(*taken, strict=True), strict=True):
            order.count_reads(counts, times)

    def _before(self, source: int, block: int) -> int:
        """Samples that `source` fills in the first `block` blocks."""
        low, high = self._ends[source], self._ends[source + 1]
        return (block * BLOCK * high // _UNIT) - (block * BLOCK * low // _UNIT)

    def _labels(self, stream: int, block: int) -> np.ndarray:
        """The source of each position of a block: [BLOCK] int64."""
        sources = range(len(self._orders))
        counts = [self._before(source, block + 1) - self._before(source, block) for source in sources]
        labels = np.repeat(np.arange(len(self._orders)), counts)
        return labels[seeded_permutation(BLOCK, _MIXTURE, self._seed, stream, block)]


def create_order(manifest: Manifest, section: DataConfig, seed: int) -> StreamOrder | MixedOrder:
    """The order that the recipe's `data` section asks for; raises `ManifestError`, `ConfigError`."""

    def order(source: int | None) -> StreamOrder:
        return StreamOrder(
            manifest,
            num_streams=section.num_streams,
            shuffle_window=section.shuffle_window,
            seed=seed,
            source=source,
            replacement=section.replacement,
        )

    if not section.weights:
        return order(None)
    return MixedOrder([order(source) for source in range(len(section.weights))], section.weights, seed)
