"""Data and folders of the training tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neuclip_scale.data.synthetic import write_synthetic_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs in three shards."""
    folder = tmp_path_factory.mktemp("training") / "shards"
    write_synthetic_shards(folder, num_samples=40, samples_per_shard=14, image_size=40, seed=1)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs that is removed at the end: their checkpoints are 100 MB each."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise equality needs the same number of threads, and tiny tensors want no more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
