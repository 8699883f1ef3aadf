"""The virtual cluster itself: what it has started ends with the tests, even with killed ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, lacking, until
from ports import free_ports

_TESTS = """
import sys, time
from pathlib import Path
from cluster import Cluster

cluster = Cluster(Path(sys.argv[1]))
cluster.start()
job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "srun sleep 1000 & sleep 1000; wait").strip()
cluster.until(lambda: "sleep" in str(cluster.processes()), 60)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    if reason := lacking():
        pytest.skip(f"no Slurm: {reason}")
    made = Path(tempfile.mkdtemp(prefix="slurm-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_nothing_survives_killed_tests(folder: Path) -> None:
    """Neither daemons, nor the processes of a job, which have left their parents long ago."""
    helpers = list(map(str, Path(__file__).parents[:2]))
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {helpers}\n{_TESTS}"]
    with subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        if tests.stdout.readline() != "ready\n":
            pytest.skip("no Slurm: it does not start here")
        below = psutil.Process(tests.pid).children(recursive=True)
        names = {process.name() for process in below}
        assert {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"} <= names
        tests.kill()
    until(lambda: not any(process.is_running() for process in below), 20, lambda: f"left: {below}")


def test_a_drained_node_serves_again(cluster: Cluster) -> None:
    cluster.run("scontrol", "update", f"nodename={cluster.nodes[1]}", "state=drain", "reason=test")
    assert cluster.node_states()[cluster.nodes[1]] == "drained"
    cluster.serve_again()
    assert cluster.node_states() == dict.fromkeys(cluster.nodes, "idle")


def test_free_ports_are_different_and_below_those_of_outgoing_connections() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(10_000 <= port < 32_768 for port in ports)
