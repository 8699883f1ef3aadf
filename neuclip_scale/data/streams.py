"""The canonical order of training samples: the same on any number of ranks and workers.

Every epoch permutes the shards by (seed, epoch). The concatenation of their samples is cut into `num_streams`
contiguous spans whose lengths differ by at most one, and stream s reads span s. Inside a span, windows of
`shuffle_window` samples are permuted by (seed, epoch, stream, window). A stream therefore has the same length
in every epoch, one integer `position` is its whole state, and any position is found without reading what is
before it.

With replacement there are no epochs: each window is a run of `shuffle_window` samples from a place that is drawn
anew, so that every sample is as likely as any other and a window still lies in one or two shards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from neuclip_scale.data.manifest import Manifest, ManifestError

# First word of every seed below, so that no two uses of one seed can share a random sequence.
_SHARDS, _WINDOW = 1, 2
_PLACE = 4  # 3 and 5 are used elsewhere in this package


def seeded_permutation(length: int, *seed: int) -> np.ndarray:
    """A permutation of range(length) that depends on `seed` alone: [length] int64.

    numpy promises PCG64's raw output on every platform and version, but not `Generator.permutation`'s.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(keys, kind="stable")


class StreamOrder:
    """Which sample stands at which position of which stream; pure, nothing is read."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_streams: int,
        shuffle_window: int,
        seed: int,
        source: int | None = None,
        replacement: bool = False,
    ) -> None:
        """Over all samples, or those of one source. Raises `ManifestError` for fewer samples than streams."""
        shards = [shard for shard in manifest.shards if source is None or shard.source == source]
        self.num_samples = sum(shard.num_samples for shard in shards)
        if self.num_samples < num_streams:
            which = "the data has" if source is None else f"source {source + 1} of data.train has"
            raise ManifestError(
                f"data.num_streams = {num_streams}: {which} only {self.num_samples} sample(s). "
                "Use fewer streams or more data."
            )
        self.num_streams = num_streams
        self.whole_epochs = not replacement
        """Whether every sample stands exactly once in each epoch."""
        self._window = shuffle_window
        # SeedSequence takes no negative number; one more word keeps the sources' draws apart.
        self._seed = (seed % (1 << 64),) if not source else (seed % (1 << 64), source)
        self._first_index = np.asarray([shard.first_index for shard in shards], dtype=np.int64)
        self._sizes = np.asarray([shard.num_samples for shard in shards], dtype=np.int64)
        # span s is [bounds[s], bounds[s + 1]) of the epoch's concatenation
        self._bounds = [self.num_samples * s // num_streams for s in range(num_streams + 1)]
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def length(self, stream: int) -> int:
        """Samples of one stream in each epoch."""
        return self._bounds[stream + 1] - self._bounds[stream]

    def epoch_of(self, stream: int, position: int) -> int:
        """Passes that the stream has finished at `position`."""
        return position // self.length(stream)

    def walk(self, stream: int, position: int = 0) -> Iterator[int]:
        """Dense sample indices from `position` on, without end."""
        epoch, offset = divmod(position, self.length(stream))
        number, skip = divmod(offset, self._window)
        while True:
            while number * self._window < self.length(stream):
                yield from self.window(stream, epoch, number)[skip:].tolist()
                number, skip = number + 1, 0
            epoch, number = epoch + 1, 0

    def count_reads(self, positions: Sequence[int], times: np.ndarray) -> None:
        """Add to `times` [n] how often each dense sample index was read when the streams stand at `positions`."""
        for stream, position in enumerate(positions):
            start = 0
            while start < position:
                epoch, offset = divmod(start, self.length(stream))
                window = self.window(stream, epoch, offset // self._window)[: position - start]
                times[window] += 1  # a window holds no index twice
                start += len(window)

    def window(self, stream: int, epoch: int, number: int) -> np.ndarray:
        """Dense sample indices of one window in reading order: [<= shuffle_window] int64."""
        start = self._bounds[stream] + number * self._window
        stop = min(start + self._window, self._bounds[stream + 1])
        order, ends = self._epoch(epoch)
        places = seeded_permutation(stop - start, _WINDOW, *self._seed, epoch, stream, number)
        if self.whole_epochs:
            places += start
        else:
            drawn = np.random.PCG64(np.random.SeedSequence((_PLACE, *self._seed, epoch, stream, number))).random_raw()
            places = (places + int(drawn) % self.num_samples) % self.num_samples
        slots = np.searchsorted(ends, places, side="right")
        shards = order[slots]
        return self._first_index[shards] + places - (ends[slots] - self._sizes[shards])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order and where each ends in the concatenation: two [num_shards] int64."""
        if epoch not in self._epochs:
            order = seeded_permutation(len(self._sizes), _SHARDS, *self._seed, epoch)
            self._epochs[epoch] = order, np.cumsum(self._sizes[order])
            if len(self._epochs) > 2:  # streams of one batch stand in two neighbouring epochs at most times
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
