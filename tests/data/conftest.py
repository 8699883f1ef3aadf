"""Small real shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuclip_scale.data.manifest import Manifest, build_manifest
from neuclip_scale.data.shards import expand_shards
from neuclip_scale.data.synthetic import write_synthetic_shards


@pytest.fixture(scope="session")
def clean_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """45 pairs in shards of 8 (the last has 5)."""
    return build_manifest(write_synthetic_shards(tmp_path_factory.mktemp("clean"), 45, 8, 24, seed=1))


@pytest.fixture
def damaged_manifest(tmp_path: Path) -> Callable[[], Manifest]:
    """Manifest of the shards that a test has written to its tmp_path."""
    return lambda: build_manifest(expand_shards(str(tmp_path)))
