"""What concerns all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _nothing_left_of_other_tests() -> None:
    """Loaders fork: were a worker the one to collect a DuckDB connection of an earlier test, it would crash, for the
    connection's threads are not there.
    """
    gc.collect()
