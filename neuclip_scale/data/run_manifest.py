"""The manifest of a run: the one in its folder while the shards are still the same, else a new one."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale import distributed
from neuclip_scale.data.manifest import Manifest, assemble_manifest, index_shards
from neuclip_scale.data.shards import expand_shards


def run_manifest(path: Path, shards: str) -> Manifest:
    """The manifest at `path` if it still holds for `shards`, else one that all ranks index together and that is saved
    there (collective).
    """

    def known() -> tuple[list[str], Manifest | None]:
        found = expand_shards(shards)
        manifest = Manifest.load(path) if path.exists() else None
        if manifest is not None and manifest.is_current() and [s.path for s in manifest.shards] == found:
            return found, manifest
        return found, None

    paths, manifest = distributed.on_main(known)
    if manifest is not None:
        return manifest
    rank, world_size = distributed.rank(), distributed.world_size()
    parts = distributed.gather_objects(index_shards(paths[rank::world_size]))
    manifest = assemble_manifest([parts[i % world_size][i // world_size] for i in range(len(paths))])
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.save(path)
    return manifest
