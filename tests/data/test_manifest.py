from __future__ import annotations

import os
from pathlib import Path

import pytest

from neuclip_scale.data.manifest import Manifest, ManifestError, build_manifest
from neuclip_scale.data.shards import write_shard


def write(folder: Path, sizes: list[int]) -> list[str]:
    paths = []
    for number, size in enumerate(sizes):
        paths.append(str(folder / f"{number:05d}.tar"))
        write_shard(paths[-1], ({"__key__": f"{i}", "jpg": b"x", "txt": "t"} for i in range(size)))
    return paths


def test_dense_indices_and_faults(tmp_path: Path) -> None:
    paths = write(tmp_path, [3, 0, 2, 4, 0])
    with open(paths[3], "r+b") as stream:
        stream.truncate(5 * 1024)
    manifest = build_manifest(paths, num_threads=3)
    assert [shard.num_samples for shard in manifest.shards] == [3, 0, 2, 2, 0]
    assert [shard.first_index for shard in manifest.shards] == [0, 3, 3, 5, 7]
    assert manifest.num_samples == 7
    assert [manifest.locate(index) for index in range(7)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    assert [Path(shard.path).stem for shard in manifest.faulty_shards] == ["00001", "00003", "00004"]


def test_save_load_and_current(tmp_path: Path) -> None:
    paths = write(tmp_path, [2, 3])
    manifest = build_manifest(paths)
    manifest.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded == manifest
    assert loaded.fingerprint == manifest.fingerprint
    assert loaded.is_current()
    write(tmp_path, [2, 30])
    assert not loaded.is_current()
    assert build_manifest(paths).fingerprint != loaded.fingerprint
    os.remove(paths[0])
    assert not loaded.is_current()
    with pytest.raises(ManifestError, match=r"00000\.tar"):
        build_manifest(paths)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no shard was given"):
        build_manifest([])
    with pytest.raises(ManifestError, match=r"none of 2 shard.*00000.tar: holds no sample"):
        build_manifest(write(tmp_path, [0, 0]))


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99, "shards": []}', '{"format": 1, "shards": [{"a": 1}]}'])
def test_a_foreign_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match="manifest"):
        Manifest.load(path)
