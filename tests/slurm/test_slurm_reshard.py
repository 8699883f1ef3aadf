"""`slurm/reshard.sh` on a real Slurm: plan, parts on two nodes, totals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster
from reshard_helpers import contents, run, simple_pool, uid_of, write_subset
from slurm_runs import SCRIPTS, environment, program

SCRIPT = SCRIPTS / "reshard.sh"


def submit(cluster: Cluster, command: str, *arguments: object) -> tuple[str, str, str]:
    """Ids of the jobs that plan, copy and add up."""
    logs = str(Path(command).parent / "logs")
    Path(f"{command}.env").write_text("NEUCLIP_CPU_OPTIONS=(--cpus-per-task=1 --mem=0)\n")
    said = cluster.run(SCRIPT, *arguments, NEUCLIP=command, NEUCLIP_SITE=f"{command}.env", RESHARD_LOGS=logs)
    found = re.search(r"plan (\d+), parts (\d+), finish (\d+)", said)
    assert found, said
    return found[1], found[2], found[3]


def logged(folder: Path, job: str) -> str:
    return "".join(path.read_text() for path in sorted((folder / "logs").glob(f"*-{job}*.log")))


def test_many_nodes_write_what_one_process_writes(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    shards = simple_pool(folder / "pool", 4)
    subset = write_subset(folder / "s.npy", [s.uid for row in shards for s in row if s.uid][::2])
    common = ["-i", folder / "pool", "-s", subset, "--shuffle", "--shard-size", 5]
    jobs = submit(cluster, program(folder), 3, *common, "-o", folder / "out")
    states = cluster.wait(*jobs)
    said = "".join(logged(folder, job) for job in jobs)
    assert states == dict.fromkeys(states, "COMPLETED"), said
    assert set(states) == {jobs[0], jobs[2], *(f"{jobs[1]}_{part}" for part in (1, 2, 3))}
    assert run(*common, "-o", folder / "whole", "-j", 1) == 0
    assert contents(folder / "out") == contents(folder / "whole")
    assert cluster.wait(*submit(cluster, program(folder), 3, *common, "-o", folder / "out"))  # nothing left to do
    assert contents(folder / "out") == contents(folder / "whole")


def test_a_part_that_dies_leaves_no_job_waiting_and_the_same_command_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool", 4)
    common = ["-i", tmp_path / "pool", "--shard-size", 5]
    dies = program(tmp_path, '[[ "$*" == *"--part 2/3"* ]] && kill -9 $$')
    plan, copy, last = submit(cluster, dies, 3, *common, "-o", tmp_path / "out")
    states = cluster.wait(plan, copy, last)
    assert states[f"{copy}_2"] == "FAILED"
    assert states[last] == "CANCELLED"
    assert [states[plan], states[f"{copy}_1"], states[f"{copy}_3"]] == ["COMPLETED"] * 3
    assert not (tmp_path / "out/reshard.json").exists()
    jobs = submit(cluster, program(tmp_path), 3, *common, "-o", tmp_path / "out")
    assert set(cluster.wait(*jobs).values()) == {"COMPLETED"}, logged(tmp_path, jobs[2])
    assert run(*common, "-o", tmp_path / "whole", "-j", 1) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_that_is_requeued_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool", 4)
    common = ["-i", tmp_path / "pool", "--shard-size", 5]
    waits = program(tmp_path, f'[[ "$*" == *--part* && ! -e {tmp_path}/go ]] && sleep 600')
    plan, copy, last = submit(cluster, waits, 1, *common, "-o", tmp_path / "out")
    cluster.until(lambda: "RUNNING" in cluster.states(copy).values(), 120)
    (tmp_path / "go").touch()
    cluster.run("scontrol", "requeue", f"{copy}_1")
    assert set(cluster.wait(plan, copy, last, seconds=300).values()) == {"COMPLETED"}
    assert (tmp_path / "out/reshard.json").exists()


def test_missing_uids_fail_the_last_job_and_are_told(cluster: Cluster, tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool", 2)
    subset = write_subset(tmp_path / "s.npy", [*(s.uid for s in shards[0] if s.uid), uid_of("nowhere")])
    jobs = submit(cluster, program(tmp_path), 1, "-i", tmp_path / "pool", "-s", subset, "-o", tmp_path / "out")
    assert cluster.wait(*jobs)[jobs[2]] == "FAILED"
    assert "1 requested sample(s) are not in the output" in logged(tmp_path, jobs[2])
    assert (tmp_path / "out/missing_uids.txt").read_text().split() == [uid_of("nowhere")]


def test_a_job_that_is_refused_takes_those_before_it_along(cluster: Cluster, tmp_path: Path) -> None:
    variables = {**environment(tmp_path), "RESHARD_LOGS": str(tmp_path / "logs")}
    # Slurm takes arrays of a thousand, and holds the plan back until it is submitted.
    status, _, errors = cluster.attempt(SCRIPT, 2000, "-i", "pool", "-o", "out", **variables, SBATCH_BEGIN="now+1hour")
    assert status == 1
    found = re.search(r"sbatch refused a job \(its reason is above\); cancelled: (\d+)\n", errors)
    assert found, errors
    assert cluster.wait(found[1]) == {found[1]: "CANCELLED"}


@pytest.mark.parametrize("parts", ["", "0", "-i", "1.5"])
def test_parts_must_be_a_number(cluster: Cluster, tmp_path: Path, parts: str) -> None:
    with pytest.raises(AssertionError, match=r"usage: slurm/reshard\.sh PARTS"):
        cluster.run(SCRIPT, parts, "-i", tmp_path, "-o", tmp_path / "out")
