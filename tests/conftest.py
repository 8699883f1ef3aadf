"""What concerns all tests."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

LONGEST_FIRST = (
    "distributed/test_engines.py",
    "audit/test_audit_spark.py",
    "slurm/test_slurm_train.py",
    "distributed/test_engine_state.py",
    "test_bench.py",
    "distributed/test_world_sizes.py",
    "distributed/test_engine_kills.py",
    "slurm/test_slurm_reproduce.py",
    "distributed/test_deepspeed_traps.py",
    "reproduce/test_reproduce_whole.py",
    "distributed/test_large_models.py",
    "planning/test_plans_against_runs.py",
    "studies/test_normalizer_study.py",
    "studies/test_methods_study.py",
    "trainer/test_resume.py",
    "trainer/test_signals.py",
    "audit/test_audit_empirical.py",
    "similarity/test_triton.py",
)
"""Files of half a minute and more. What is begun last should be short: workers then end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the others stay in their order."""
    folder, places = Path(__file__).parent, {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(folder).as_posix(), len(places)))


@pytest.fixture(autouse=True, scope="module")
def _nothing_left_of_other_tests() -> None:
    """Loaders fork: were a worker the one to collect a DuckDB connection of an earlier test, it would crash, for the
    connection's threads are not there.
    """
    gc.collect()
