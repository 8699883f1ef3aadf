"""One shard held against what its manifest says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neuclip_scale.data.cache import ShardCache
from neuclip_scale.data.indexing import file_sha256
from neuclip_scale.data.manifest import ShardEntry
from neuclip_scale.data.shards import index_shard, storage


@dataclass(frozen=True)
class CheckShard:
    """Called with a shard; can be pickled."""

    cache_folder: Path
    cache_bytes: int

    def __call__(self, shard: ShardEntry) -> list[str]:
        """What differs, one line each."""
        try:
            with ShardCache(self.cache_folder, self.cache_bytes).fetched_now(shard.path) as path:
                index = index_shard(path)
                found = {"samples": index.num_samples, "bytes": index.num_bytes, "fault": index.fault}
                if shard.sha256:
                    found["sha256"] = file_sha256(path)
        except (OSError, storage.StorageError) as error:
            return [f"{shard.path}: cannot be read: {error}"]
        told = {"samples": shard.num_samples, "bytes": shard.num_bytes, "fault": shard.fault, "sha256": shard.sha256}
        return [
            f"{shard.path}: {name} {value!r}, the manifest says {told[name]!r}"
            for name, value in found.items()
            if value != told[name]
        ]
