"""Data of the tests of plans."""

from __future__ import annotations

import pytest

from neuclip_scale.data.synthetic import write_synthetic_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans")
    write_synthetic_shards(path / "shards", num_samples=50, samples_per_shard=17, image_size=40, seed=1)
    return str(path)
