"""One cluster for all tests here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, lacking


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := lacking():
        pytest.skip(f"no Slurm: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's folders are too deep for a socket
    folder.chmod(0o755)
    running = Cluster(folder)
    try:
        try:
            running.start()
        except (AssertionError, OSError) as error:  # a container may forbid what its daemons do
            pytest.skip(f"no Slurm: it does not start here: {error}")
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nodes_that_serve(request: pytest.FixtureRequest) -> None:
    """What one test has done to the nodes does not fail the next."""
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").serve_again()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the daemons said when a test fails."""
    report = yield
    running = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and running is not None:
        report.sections.append(("Slurm's daemons", running.logs()))
    return report
