"""`slurm/reproduce.sh` on a real Slurm: a chain from a list to a report, over a training that fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster
from reproduce_helpers import arguments, make_demo_data, report
from slurm_runs import SCRIPTS, environment

from neuclip_scale.run_folder import read_object


def submit(cluster: Cluster, folder: Path, *given: str, before: str = "") -> list[str]:
    """Ids of the submitted jobs."""
    # More than a virtual node has would never start.
    site = "NEUCLIP_SBATCH_OPTIONS=(--cpus-per-task=1 --mem=0)\nNEUCLIP_CPU_OPTIONS=(--time=10)\n"
    (folder / "site.env").write_text(site)
    variables = {"REPRODUCE_LOGS": str(folder / "logs"), "NEUCLIP_TRIES": "1"}
    said = cluster.run(SCRIPTS / "reproduce.sh", *given, **environment(folder, before, **variables))
    found = re.search(r"submitted: ([\d ]+);", said)
    assert found, said
    return found[1].split()


@pytest.mark.long
def test_a_chain_tells_of_a_training_that_failed_and_goes_on_with_the_same_command(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "with space"
    demo_data, output = make_demo_data(folder / "demo"), folder / "out"
    given = arguments(demo_data, output, "--nodes", 2)
    breaks = '[[ "$1" == train && "$*" == *objective.name=openclip* ]] && exit 3'
    *prepared, openclip, neuclip, without, evaluated, written = submit(cluster, folder, *given, before=breaks)
    log = folder / f"logs/download-{prepared[2]}.log"
    cluster.until(lambda: log.exists() and "download: begins" in log.read_text(), 120)
    cluster.run("scancel", "--signal=USR1", "--batch", prepared[2])  # as Slurm does before the time limit
    cluster.until(lambda: cluster.details(prepared[2])["Restarts"] == "1", 60, log.read_text)
    states = cluster.wait(*prepared, openclip, neuclip, without, evaluated, written, seconds=400)
    said = "".join(path.read_text(errors="replace") for path in sorted((folder / "logs").iterdir()))
    done = [*prepared, neuclip, evaluated, written]
    assert states == dict.fromkeys(done, "COMPLETED") | {openclip: "FAILED", without: "CANCELLED"}, said
    found = report(output)
    assert {name: run["finished"] for name, run in found["runs"].items()} == {
        "openclip-seed0": False, "neuclip-seed0": True,
    }  # fmt: skip
    assert "train/openclip-seed0" not in found["stages"]
    assert read_object(output / "runs/neuclip-seed0/summary.json")["world_size"] == 2, "one rank on each node"

    again = submit(cluster, folder, *given)
    assert len(again) == 3, "one training, its evaluation, and the report"
    assert set(cluster.wait(*again, seconds=200).values()) == {"COMPLETED"}
    assert all(run["finished"] for run in report(output)["runs"].values())
    batches = [read_object(output / f"runs/{name}-seed0/summary.json")["audit"] for name in ("openclip", "neuclip")]
    assert batches[0] == batches[1]
    prepared_only = [*given, "--until", "index"]
    assert "nothing is left to do" in cluster.run(SCRIPTS / "reproduce.sh", *prepared_only, **environment(folder))


def test_what_cannot_be_is_refused_before_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    status, _, said = cluster.attempt(SCRIPTS / "reproduce.sh", "cc3m", **environment(tmp_path))
    assert status == 2
    assert "Train_GCC-training.tsv" in said
    assert "nothing was submitted" in said
    given = arguments(make_demo_data(tmp_path / "demo"), tmp_path / "out", "--nodes", 3)
    status, _, said = cluster.attempt(SCRIPTS / "reproduce.sh", *given, **environment(tmp_path))
    assert status == 2
    assert "not started: demo on 3 node(s)" in said
    assert "data.num_streams = 4" in said
    status, planned, _ = cluster.attempt(SCRIPTS / "reproduce.sh", *given, "--dry-run", **environment(tmp_path))
    assert status == 0
    assert "neuclip train demo" in planned
    assert cluster.run("squeue", "-h", "-t", "pending,running") == ""
