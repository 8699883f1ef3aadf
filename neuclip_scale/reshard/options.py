"""What a reshard is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuclip_scale.reshard.errors import UsageError
from neuclip_scale.reshard.images import ImageWork
from neuclip_scale.reshard.plan import Cut

DEFAULT_SHARD_SIZE = 10_000
"""DataComp's."""


@dataclass(frozen=True, kw_only=True)
class ReshardOptions:
    """A pool, what to take of it, and where to write it."""

    input_dir: Path
    output_dir: Path
    subset_file: Path | None = None
    where: str = ""
    shard_size: int = 0
    """Samples; 0 with no `shard_bytes` means DEFAULT_SHARD_SIZE."""
    shard_bytes: int = 0
    shuffle_seed: int | None = None
    images: ImageWork = field(default_factory=ImageWork)
    num_workers: int = 1

    @property
    def cut(self) -> Cut:
        """How large output shards are."""
        return Cut(self.shard_size or (0 if self.shard_bytes else DEFAULT_SHARD_SIZE), self.shard_bytes)

    def check(self) -> None:
        """Raises `UsageError` for arguments that contradict each other."""
        if self.subset_file is not None and self.where:
            raise UsageError(
                "--subset-file and --where: give one. A predicate can be turned into a list of uids first."
            )
        if self.shard_size < 0 or self.shard_bytes < 0 or (self.shard_size and self.shard_bytes):
            raise UsageError(
                f"--shard-size {self.shard_size}, --shard-bytes {self.shard_bytes}: give one of them, and positive."
            )
        if self.num_workers < 1:
            raise UsageError(f"--num-workers {self.num_workers}: give 1 or more.")
        self.images.check()

    def settings(self, request_digest: str, pool_digest: str) -> dict[str, Any]:
        """What the output depends on, and nothing else: equal settings are one plan."""
        return {
            "pool": pool_digest,
            "subset_file": request_digest,
            "where": self.where,
            "shard_size": self.cut.samples,
            "shard_bytes": self.cut.num_bytes,
            "shuffle_seed": self.shuffle_seed,
            "resize": self.images.resize,
            "encode": self.images.encode,
            "blur_faces": self.images.blur_faces,
        }
