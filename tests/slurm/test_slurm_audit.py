"""`slurm/audit.sh` on a real Slurm: what it finds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from audit_worlds import Shard, write_download, write_published
from cluster import Cluster
from slurm_runs import SCRIPTS, program


def test_an_audit_is_a_job_and_a_discrepancy_no_failure(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    write_published(folder / "list.parquet", list(range(9)))
    write_download(folder / "d", [Shard([(n, None) for n in range(9)], [(n, None) for n in range(7)])])
    arguments = ["--manifest", folder / "list.parquet", "--download", folder / "d", "--output", folder / "out"]
    log = f"--output={tmp_path}/log"
    # More than a virtual node has would never start.
    small = ("--cpus-per-task=1", "--mem=0")
    jobs = [
        cluster.run(
            "sbatch", "--parsable", *small, log, SCRIPTS / "audit.sh", *arguments, NEUCLIP=program(folder)
        ).strip()
    ]
    assert cluster.wait(*jobs) == {jobs[0]: "COMPLETED"}, (tmp_path / "log").read_text()
    assert "exit status 1" in (tmp_path / "log").read_text()
    assert json.loads((folder / "out/audit.json").read_bytes())["counts"]["missing"] == 2


def test_an_audit_without_a_list_is_refused_before_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    status, _, said = cluster.attempt(SCRIPTS / "audit.sh", "--download", tmp_path, NEUCLIP=program(tmp_path))
    assert status == 2
    assert "usage: slurm/audit.sh --manifest" in said
