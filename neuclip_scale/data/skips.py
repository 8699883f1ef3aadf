"""What becomes of samples that cannot be used: they are counted, listed, and too many of them end the run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from neuclip_scale.data.manifest import Manifest
from neuclip_scale.files import naming

MIN_READ = 100
"""Fractions are taken of at least this many samples, so that one early bad sample does not end a run."""

_NUM_SHOWN = 5


class TooManyBadSamples(RuntimeError):  # noqa: N818 - says what is wrong
    """More samples were unusable than `data.max_bad_fraction` allows."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was passed over."""

    shard: str
    key: str
    sample_index: int
    reason: str

    def __str__(self) -> str:
        return f"{self.shard} {self.key}: {self.reason}"


def check_bad_fraction(
    num_read: int, num_bad: int, first: Sequence[SkippedSample], max_fraction: float, listing: str
) -> None:
    """Raise `TooManyBadSamples` when `num_bad` of `num_read` is above `max_fraction`."""
    if num_bad <= max_fraction * max(num_read, MIN_READ):
        return
    shown = "".join(f"\n  {sample}" for sample in first[:_NUM_SHOWN])
    raise TooManyBadSamples(
        f"{num_bad} of {num_read} samples read could not be used ({num_bad / num_read:.1%}), more than "
        f"data.max_bad_fraction = {max_fraction:g}. First ones:{shown}\n"
        f"Repair or remove them ({listing}), check data.image_keys and data.caption_key or data.captions, or raise "
        "data.max_bad_fraction."
    )


class SkipLog:
    """A file with one JSON object for each sample this rank skipped.

    It is appended to: {"shard", "key", "sample_index", "reason"}, key and sample_index null for a fault of a
    whole shard. A resumed run lists again what it meets again; counts are the caller's, over all ranks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.first: list[SkippedSample] = []
        """The first few, for messages."""

    def add(self, skipped: Sequence[SkippedSample]) -> None:
        """List samples."""
        self.first += skipped[: _NUM_SHOWN - len(self.first)]
        self._append([asdict(sample) for sample in skipped])

    def add_shard_faults(self, manifest: Manifest) -> None:
        """List the shards that are cut off, corrupt or empty; they do not count as samples."""
        faults = manifest.faulty_shards
        self._append([{"shard": s.path, "key": None, "sample_index": None, "reason": s.fault} for s in faults])

    def _append(self, rows: Sequence[dict[str, object]]) -> None:
        if rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.path), open(self.path, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
