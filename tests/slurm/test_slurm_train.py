"""slurm/train_*.sh on a real Slurm of two nodes: finished, interrupted in every way, and always the same run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster
from evaluation_helpers import COLOURS, jpeg, write_set
from slurm_runs import SCRIPTS, STEPS, demo_scale, environment, output, sbatch, steps_logged
from trainer_helpers import assert_same, logged_steps, neuclip_ranks

from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.run_status import read_status

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm-data") / "with space"
    write_synthetic_shards(folder, num_samples=40, samples_per_shard=14, image_size=40, seed=1)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of datacomp_small on two ranks without Slurm and without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    argv = ["train", "datacomp_small", *demo_scale(data, folder / "run")]
    assert neuclip_ranks(2, argv, folder / "output.txt") == [0, 0]
    yield folder / "run"
    shutil.rmtree(folder)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs that is removed at the end."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def digests(run_dir: Path) -> list[Any]:
    return [(line["step"], line["batch_digest"]) for line in logged_steps(run_dir)]


def attempts(run_dir: Path) -> list[str]:
    return [attempt["outcome"] for attempt in json.loads((run_dir / "attempts.json").read_text())]


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    """Return once the run in `folder/run` has logged `step`."""

    def reached() -> bool:
        assert cluster.state(job) in ("PENDING", "RUNNING", "COMPLETING"), output(folder, job)
        return steps_logged(folder / "run") >= step

    cluster.until(reached, 240, lambda: output(folder, job))


def finished(cluster: Cluster, folder: Path, job: str) -> str:
    """What a job has printed, once it has COMPLETED."""
    states = cluster.wait(job)
    said = output(folder, job)
    assert states == {job: "COMPLETED"}, said
    return said


def test_train_xl_is_the_run_it_would_be_without_slurm(cluster: Cluster, data: Path, whole: Path, runs: Path) -> None:
    """ViT-L/14's recipe at demo scale: DeepSpeed ZeRO, bf16, gradient cache."""
    arguments = demo_scale(data, runs / "run", **{"train.num_steps": 6})
    variables = {"NEUCLIP_PREFLIGHT": "1", "NEUCLIP_FLOOR_GBPS": "0.0001"}
    # Ranks that have said all may take a while to end: nobody kills them.
    slow = f'"{sys.executable}" -m neuclip_scale "$@"; sleep 2; touch "{runs}/ended-$SLURM_PROCID"; exit'
    slow = f'if [[ "$1 $2" == "preflight probe" ]]; then {slow}; fi'
    said = finished(cluster, runs, sbatch(cluster, "train_xl.sh", runs, *arguments, before=slow, **variables))
    assert len(list(runs.glob("ended-*"))) == 2
    assert "preflight: 2 node(s) are fit" in said
    assert "preflight: data: " in said
    assert digests(runs / "run") == digests(whole)[:6]  # no recipe changes the samples or their order
    status = read_status(runs / "run")
    assert (status.state, status.step, status.num_steps, status.is_well) == ("finished", 6, 6, True)
    config = (runs / "run/config.yaml").read_text()
    assert all(part in config for part in ("precision: bf16", "name: deepspeed", "config: zero1"))
    logs = runs / "run/logs"
    assert "step 6/6" in (logs / "rank_00000.log").read_text()
    assert "accelerator" in (logs / "rank_00001.log").read_text()  # DeepSpeed says so on each rank
    assert "0: step 6/6" in (logs / "all.log").read_text()
    assert "0: step 6/6" in said


def test_a_time_limit_a_preemption_and_scancel_all_go_on_to_the_same_numbers(
    cluster: Cluster, data: Path, whole: Path, runs: Path
) -> None:
    arguments = demo_scale(data, runs / "run")
    job = sbatch(cluster, "train_small.sh", runs, *arguments)
    wait_for_step(cluster, job, runs, 5)
    status = read_status(runs / "run")
    assert (status.state, status.num_steps, status.world_size) == ("running", STEPS, 2), status
    assert f"job {job}" in status.why
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as `--signal=B:USR1@300` does before the time limit
    cluster.until(lambda: cluster.details(job)["Restarts"] == "1", 60, lambda: output(runs, job))
    assert "stopped by SIGUSR1" in output(runs, job)
    wait_for_step(cluster, job, runs, steps_logged(runs / "run") + 5)
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.until(lambda: cluster.details(job)["Restarts"] == "2", 60, lambda: output(runs, job))
    assert cluster.wait(urgent.strip()) == {urgent.strip(): "COMPLETED"}
    wait_for_step(cluster, job, runs, steps_logged(runs / "run") + 5)
    cluster.run("scancel", job)
    assert cluster.wait(job) == {job: "CANCELLED"}
    cluster.until(lambda: set(cluster.node_states().values()) == {"idle"}, 60)
    finished(cluster, runs, sbatch(cluster, "train_small.sh", runs, *arguments))
    assert cluster.state(job) == "CANCELLED"
    outcomes = attempts(runs / "run")
    assert (outcomes[0], outcomes[-1], len(outcomes)) == ("stopped", "finished", 4)
    assert_same(logged_steps(runs / "run"), logged_steps(whole))


@pytest.mark.long
def test_a_killed_rank_and_a_node_that_fails_cost_only_the_steps_since_the_checkpoint(
    cluster: Cluster, data: Path, whole: Path, runs: Path
) -> None:
    job = sbatch(cluster, "train_medium.sh", runs, *demo_scale(data, runs / "run"))
    wait_for_step(cluster, job, runs, 9)
    os.kill(rank_of(job, 1).pid, signal.SIGKILL)
    cluster.until(lambda: cluster.details(job)["Restarts"] == "1", 90, lambda: output(runs, job))
    assert "tries without progress: 0 of 3" in output(runs, job)
    wait_for_step(cluster, job, runs, 17)
    cluster.stop_node(cluster.nodes[1])
    try:
        cluster.until(lambda: cluster.details(job)["Restarts"] == "2", 90, lambda: output(runs, job))
    finally:
        cluster.start_node(cluster.nodes[1])
    finished(cluster, runs, job)
    assert attempts(runs / "run")[0] == "failed"
    assert attempts(runs / "run")[-1] == "finished"
    assert digests(runs / "run") == digests(whole)


def rank_of(job: str, rank: int) -> psutil.Process:
    """The process of a rank: the first of those that Slurm gave its number."""
    found = []
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except psutil.Error:
            continue
        if variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_PROCID") == str(rank):
            found.append(process)
    ranks = [process for process in found if "train" in process.cmdline() and process.parent() not in found]
    assert len(ranks) == 1, found
    return ranks[0]


@pytest.mark.long
def test_a_chain_goes_on_after_a_hang_where_requeueing_is_forbidden(
    cluster: Cluster, data: Path, whole: Path, runs: Path
) -> None:
    arguments = demo_scale(data, runs / "run", **{"train.hang_timeout_seconds": 12})
    variables = environment(runs, NEUCLIP_CHAIN="3", SBATCH_OUTPUT=f"{runs}/%x-%j.log")
    said = cluster.run(SCRIPTS / "train_large.sh", "--nodes", 2, *arguments, **variables)
    jobs = said.partition(";")[0].split()[1:]
    assert len(jobs) == 3
    wait_for_step(cluster, jobs[0], runs, 9)
    os.kill(rank_of(jobs[0], 1).pid, signal.SIGSTOP)
    states = cluster.wait(*jobs)
    assert states == dict(zip(jobs, ["FAILED", "COMPLETED", "COMPLETED"])), output(runs, jobs[1])
    assert attempts(runs / "run") == ["failed", "finished"]  # the third had nothing to do
    assert "suspect: rank 1 on" in (runs / "run/stacks/rank_00000.txt").read_text()
    assert "state T (stopped)" in output(runs, jobs[0])
    assert digests(runs / "run") == digests(whole)


@pytest.mark.long
def test_a_bad_node_is_named_excluded_and_the_job_requeued(cluster: Cluster, data: Path, runs: Path) -> None:
    arguments = demo_scale(data, runs / "run", **{"train.num_steps": 2})
    hangs = f'[[ "$1 $2" == "preflight probe" && $SLURMD_NODENAME == {cluster.nodes[0]} ]] && exec sleep 600'
    variables = {"NEUCLIP_PREFLIGHT": "1", "NEUCLIP_EXCLUDE_BAD": "1", "NEUCLIP_PREFLIGHT_SECONDS": "20"}
    job = sbatch(cluster, "train_small.sh", runs, *arguments, nodes=1, before=hangs, **variables)
    said = finished(cluster, runs, job)
    assert f"preflight: BAD node {cluster.nodes[0]}: no answer: it does not start, or hangs" in said
    assert "preflight: 1 node(s) are fit" in said
    details = cluster.details(job)
    assert (details["ExcNodeList"], details["NodeList"]) == (cluster.nodes[0], cluster.nodes[1])
    assert attempts(runs / "run") == ["failed", "finished"]


def test_a_crash_loop_stops(cluster: Cluster, data: Path, runs: Path) -> None:
    arguments = demo_scale(data, runs / "run")
    dies = "[[ $1 == train && $SLURM_PROCID == 1 ]] && kill -9 $$; [[ $1 == train ]] && exec sleep 60"
    job = sbatch(cluster, "train_small.sh", runs, *arguments, before=dies, NEUCLIP_TRIES="2")
    assert cluster.wait(job) == {job: "FAILED"}
    assert attempts(runs / "run") == ["failed", "failed"]
    assert "2 attempt(s) in a row came no further than step 0" in output(runs, job)


def test_wrong_settings_are_rejected_before_the_queue(cluster: Cluster, data: Path, runs: Path) -> None:
    arguments = demo_scale(data, runs / "run")
    before = cluster.run("squeue", "-h", "-t", "all", "-o", "%i")
    command = [SCRIPTS / "train_xl.sh", "--nodes", 3, *arguments]
    status, said, errors = cluster.attempt(*command, **environment(runs))
    assert (status, said) == (2, "")
    assert "data.num_streams = 4: not a multiple of the 3 ranks. Use" in errors
    status, _, errors = cluster.attempt(SCRIPTS / "train_xl.sh", *arguments, "--train.globl 1", **environment(runs))
    assert status == 2
    assert "--train.globl" in errors
    assert cluster.run("squeue", "-h", "-t", "all", "-o", "%i") == before
    assert not (runs / "run").exists()
    checked = cluster.attempt(SCRIPTS / "train_xl.sh", "--check", "--nodes", 4, *arguments, **environment(runs))
    assert checked[:2] == (0, "")
    assert "8 pairs a step over 4 ranks" in checked[2]


def test_nodes_of_four_gpus_are_asked_for_by_trainings_alone(
    cluster: Cluster, data: Path, whole: Path, runs: Path
) -> None:
    """By one setting of the site, and not by jobs that need one GPU or none."""
    (runs / "site.env").write_text(f"NEUCLIP_TASKS_PER_NODE=4\nNEUCLIP_SBATCH_OPTIONS=(--hold --output={runs}/log)\n")
    scripts = {
        "train_small.sh": (["--nodes", "1", *demo_scale(data, runs / "run")], "4", "gpu:4"),
        "evaluate.sh": ([str(whole), "--data", str(data)], "1", "gpu:1"),
        "audit.sh": (["--manifest", "list", "--download", "mine"], "1", ""),
    }
    for script, (arguments, tasks, gpus) in scripts.items():
        job = cluster.run(SCRIPTS / script, *arguments, **environment(runs)).split("submitted: ")[1].split(";")[0]
        asked = cluster.details(job.strip())
        cluster.run("scancel", job.strip())
        assert asked["NtasksPerN:B:S:C"].split(":")[0] == tasks, script
        assert asked.get("TresPerNode", "").removeprefix("gres:").removeprefix("gres/") == gpus, script


def test_a_job_with_wrong_settings_ends_with_2_before_anything_starts(cluster: Cluster, data: Path, runs: Path) -> None:
    job = sbatch(cluster, "train_small.sh", runs, *demo_scale(data, runs / "run", **{"data.num_streams": 3}))
    assert cluster.wait(job) == {job: "FAILED"}
    assert cluster.details(job)["ExitCode"] == "2:0"
    assert "data.num_streams = 3: not a multiple of the 2 ranks. Use" in output(runs, job)
    assert not (runs / "run").exists()


def test_evaluate_scores_a_run(cluster: Cluster, whole: Path, runs: Path) -> None:
    """By the settings of a site: its file tells where the sets are."""
    pictures = [{"png": jpeg(colour), "cls": str(number)} for number, colour in enumerate(COLOURS.values())]
    write_set(runs / "sets/colours", [pictures], classnames="\n".join(COLOURS))
    (runs / "site.env").write_text(f"NEUCLIP_EVALUATION={runs}/sets\n")
    result = runs / "result.json"
    job = sbatch(cluster, "evaluate.sh", runs, str(whole), "--json", str(result), nodes=1)
    said = finished(cluster, runs, job)
    scores = json.loads(result.read_text())
    assert scores["data"] == f"{runs}/sets"
    assert "colours" in json.dumps(scores["evaluation"]), said
    for given in ([str(runs / "nothing")], [str(whole), "--data", str(runs / "nothing")]):
        status, _, errors = cluster.attempt(SCRIPTS / "evaluate.sh", *given, **environment(runs))
        assert status == 2
        assert "nothing': no such" in errors
