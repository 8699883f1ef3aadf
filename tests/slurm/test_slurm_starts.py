"""The scripts around a training, which is a stand-in here: calls in one allocation, ends before the first step."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_runs import SCRIPTS, demo_scale, environment, output, program, sbatch

from neuclip_scale.data.synthetic import write_synthetic_shards

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def outcomes(run_dir: Path) -> list[str]:
    path = run_dir / "attempts.json"
    return [attempt["outcome"] for attempt in json.loads(path.read_text())] if path.exists() else []


def test_calls_in_one_allocation_are_submissions_by_themselves(cluster: Cluster, tmp_path: Path) -> None:
    """What was refused can be mended, and what has finished be done again; ports of two at once differ."""
    stand_in = f'[[ $1 == train ]] && {{ echo $MASTER_PORT >>"{tmp_path}/ports"; exit $(<"{tmp_path}/status"); }}'
    script = shlex.join([str(SCRIPTS / "train_small.sh"), *demo_scale(tmp_path / "data", tmp_path / "run")])
    calls = "; ".join(f'echo {status} >"{tmp_path}/status"; {script}; echo "ended: $?"' for status in (2, 0, 1, 0))
    command = ["salloc", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", calls]
    status, said, errors = cluster.attempt(*command, **environment(tmp_path, stand_in))
    assert status == 0, errors
    assert [line for line in said.splitlines() if line.startswith("ended: ")] == [
        "ended: 2", "ended: 0", "ended: 75", "ended: 0"
    ], errors  # fmt: skip
    assert outcomes(tmp_path / "run") == ["refused", "finished", "failed", "finished"]
    assert len(set((tmp_path / "ports").read_text().split())) == 4


@pytest.mark.parametrize("where", ["preflight", "train", "train, and killed before its end is noted"])
def test_a_preemption_before_the_first_step_is_no_failure(cluster: Cluster, tmp_path: Path, where: str) -> None:
    where, _, killed = where.partition(",")
    began = tmp_path / "began"
    first = f'[[ -e "{began}" ]] || {{ touch "{began}"; exec sleep 100; }}'
    stand_in = f'if [[ "$1 $2" == "{where} "* && "$2" != judge ]]; then {first}; fi; [[ $1 == train ]] && exit 0'
    if killed:
        stand_in += f'; [[ "$1 $2" == "job end" && ! -e "{began}.end" ]] && {{ touch "{began}.end"; exec sleep 100; }}'
    variables = {"NEUCLIP_TRIES": "1", "NEUCLIP_PREFLIGHT": "1"}
    write_synthetic_shards(tmp_path / "data", num_samples=4, samples_per_shard=4, image_size=16, seed=1)
    arguments = demo_scale(tmp_path / "data", tmp_path / "run")
    job = sbatch(cluster, "train_small.sh", tmp_path, *arguments, nodes=1, before=stand_in, **variables)
    cluster.until(began.exists, 120, lambda: output(tmp_path, job))
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--output=/dev/null", "--wrap", "true").strip()
    assert cluster.wait(urgent) == {urgent: "COMPLETED"}
    assert cluster.wait(job) == {job: "COMPLETED"}, output(tmp_path, job)
    assert outcomes(tmp_path / "run") == ["stopped", "finished"]


@pytest.mark.parametrize("where", ["preflight", "train"])
def test_a_preemption_is_known_by_the_state_of_the_job(cluster: Cluster, tmp_path: Path, where: str) -> None:
    """Slurm ends the ranks of its own accord, and its TERM may come when they are long over; here, never."""
    began = tmp_path / "began"
    first = f'[[ -e "{began}" ]] || {{ touch "{began}"; exec sleep 100; }}'
    stand_in = f'if [[ "$1 $2" == "{where} "* && "$2" != judge ]]; then {first}; fi; [[ $1 == train ]] && exit 0'
    variables = {"NEUCLIP_TRIES": "1", "NEUCLIP_PREFLIGHT": "1"}
    write_synthetic_shards(tmp_path / "data", num_samples=4, samples_per_shard=4, image_size=16, seed=1)
    script = shlex.join(["bash", str(SCRIPTS / "train_small.sh"), *demo_scale(tmp_path / "data", tmp_path / "run")])
    options = ["--requeue", "--exclusive", "--nodes=1", "--open-mode=append", f"--output={tmp_path}/%x-%j.log"]
    deaf = ["--wrap", f"trap '' TERM; exec {script}"]
    job = cluster.run("sbatch", "--parsable", *options, *deaf, **environment(tmp_path, stand_in, **variables)).strip()
    cluster.until(began.exists, 120, lambda: output(tmp_path, job))
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--output=/dev/null", "--wrap", "true").strip()
    assert cluster.wait(urgent) == {urgent: "COMPLETED"}
    assert cluster.wait(job) == {job: "COMPLETED"}, output(tmp_path, job)
    assert outcomes(tmp_path / "run") == ["stopped", "finished"]


def test_help_of_a_script_submits_nothing(tmp_path: Path) -> None:
    command = [SCRIPTS / "train_xl.sh", "--nodes", "2", "--help"]
    variables = {"NEUCLIP": program(tmp_path), "PATH": "/usr/bin:/bin", "NEUCLIP_SITE": str(tmp_path / "none")}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--train.global-batch-size INT" in done.stdout
    assert "submitted" not in done.stdout
    assert not list(tmp_path.glob("runs*"))
