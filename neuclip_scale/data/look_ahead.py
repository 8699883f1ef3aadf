"""Remote shards are on their way before they are needed."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Mapping

from neuclip_scale.data.cache import ShardCache
from neuclip_scale.data.manifest import Manifest, ShardEntry
from neuclip_scale.data.mixing import MixedOrder
from neuclip_scale.data.shards import storage
from neuclip_scale.data.streams import StreamOrder

_FETCHES = 2  # of one worker at once


class LookAhead:
    """Fetches the remote shards that a worker's streams will need one window later, while it reads this one."""

    def __init__(self, manifest: Manifest, order: StreamOrder | MixedOrder, cache: ShardCache, window: int) -> None:
        self._manifest, self._order, self._cache, self._window = manifest, order, cache, window
        self._seen: dict[int, int] = {}
        has_remote = any(storage.is_remote(shard.path) for shard in manifest.shards)
        self._wanted: queue.SimpleQueue[ShardEntry | None] | None = queue.SimpleQueue() if has_remote else None
        for _ in range(_FETCHES if has_remote else 0):
            # Daemons: a fetch that is tried again and again must not hold up the end of the process.
            threading.Thread(target=self._fetch, name="look ahead", daemon=True).start()

    def close(self) -> None:
        """Fetch no further shards."""
        for _ in range(_FETCHES):
            if self._wanted is not None:
                self._wanted.put(None)

    def look(self, positions: Mapping[int, int]) -> None:
        """Begin to fetch what the streams need up to two windows after their positions."""
        if self._wanted is None:
            return
        for stream, position in positions.items():
            seen = self._seen.setdefault(stream, position)
            if seen - position < self._window:
                ahead = itertools.islice(self._order.walk(stream, seen), position + 2 * self._window - seen)
                for shard in sorted({self._manifest.locate(sample_index)[0] for sample_index in ahead}):
                    self._wanted.put(self._manifest.shards[shard])
                self._seen[stream] = position + 2 * self._window

    def _fetch(self) -> None:
        assert self._wanted is not None
        while (shard := self._wanted.get()) is not None:
            # Who needs the shard meets the same error, and counts it.
            with contextlib.suppress(OSError, storage.StorageError):
                self._cache.local(shard.path, shard.version)
