"""`neuclip preflight` by real processes over gloo: two nodes of one or two ranks on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_ports

from neuclip_scale.data.synthetic import write_synthetic_shards

pytestmark = pytest.mark.distributed
NODES = ["left", "right"]


class Probes:
    """The ranks of a preflight, as srun starts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_synthetic_shards(folder / "data", num_samples=4, samples_per_shard=2, image_size=16, seed=1)
        self.common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
        self.ranks_per_node = 1
        self.ranks: list[subprocess.Popen[str]] = []
        self.lines = ""

    def start(self, rank: int, *options: str, **variables: str) -> None:
        """Start a rank; `options` come after the usual ones and win."""
        each = self.ranks_per_node
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % each), "SLURMD_NODENAME": NODES[rank // each]}
        own["WORLD_SIZE"] = str(2 * each)
        command = [sys.executable, "-m", "neuclip_scale", "preflight", "probe", "--ranks-per-node", str(each)]
        command += ["--folder", str(self.folder / "seen"), "--data", str(self.folder / "data"), "--patience", "20"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.common, **own, **variables}
        argv = [*command, *options]
        self.ranks.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment))

    def judge(self, *options: str) -> tuple[int, str, str]:
        """Exit status, bad nodes and what is told, once all ranks have ended."""
        self.lines = self.lines or "".join(rank.communicate(timeout=120)[0] for rank in self.ranks)
        command = [sys.executable, "-m", "neuclip_scale", "preflight", "judge", "--nodes", *NODES]
        command += ["--ranks-per-node", str(self.ranks_per_node), *options]
        done = subprocess.run(command, input=self.lines, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.strip(), done.stderr


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Probes]:
    probes = Probes(tmp_path)
    yield probes
    for rank in probes.ranks:
        rank.kill()
        rank.wait()


def test_good_nodes(started: Probes) -> None:
    started.ranks_per_node = 2
    for rank in range(4):
        started.start(rank, "--floor", "1000")  # so high that neighbours are measured too
    status, bad, told = started.judge("--floor", "0.0001")
    assert (status, bad) == (0, ""), told
    assert "2 node(s) are fit" in told
    status, _, slow = started.judge("--floor", "1000")  # by the same lines
    assert status == 1
    assert "GB/s, floor 1000" in slow
    for name in ("all-reduce: ", "all-reduce in a node: ", "storage: written in", "data: "):
        assert f"preflight: {name}" in told


def test_a_node_with_other_versions_storage_and_data(started: Probes, tmp_path: Path) -> None:
    other = tmp_path / "site"
    (other / "deepspeed-0.0.1.dist-info").mkdir(parents=True)
    (other / "deepspeed-0.0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n"
    )
    path = f"{other}:{os.environ.get('PYTHONPATH', '')}"
    elsewhere = ["--folder", str(tmp_path / "elsewhere"), "--data", str(tmp_path / "nothing"), "--patience", "3"]
    started.start(0, "--patience", "3")
    started.start(1, *elsewhere, PYTHONPATH=path)
    status, bad, told = started.judge()
    assert (status, bad) == (1, "right"), told
    assert "node right: versions: deepspeed 0.0.1" in told
    assert re.search(f"node right: data: .*{tmp_path}/nothing", told), told
    assert "node left" not in told


def test_a_rank_that_does_not_start(started: Probes) -> None:
    started.start(0, "--patience", "2")
    status, bad, told = started.judge("--seconds", "30")
    assert (status, bad) == (1, "right"), told
    assert "node right: no answer: it does not start, or hangs" in told
