from __future__ import annotations

import fcntl
import os

import pytest
from planted_world import PlantedWorld, load_world, make_world

from neuclip_scale.downloading import DownloadingError


@pytest.fixture(scope="session")
def two_downloads(tmp_path_factory: pytest.TempPathFactory) -> PlantedWorld:
    """Two real downloads of one list, made once (20 s), also for several test workers; copy what you change."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "planted"
    with open(folder.with_suffix(".lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return load_world(folder) or make_world(folder)
        except DownloadingError as error:
            pytest.skip(str(error))
