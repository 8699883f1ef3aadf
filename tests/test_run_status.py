"""`neuclip status` of folders in every state a run can be in; the figures against what was written."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from neuclip_scale import cli
from neuclip_scale.heartbeat import Beat, write_beat
from neuclip_scale.run_attempts import begin_attempt, end_attempt
from neuclip_scale.run_status import StatusError, read_status

FACTS = {"num_steps": 400, "world_size": 2, "global_batch_size": 8, "flops_per_pair": 10**9, "peak_flops": 1e12}


def write_metrics(run_dir: Path, steps: int, age: float = 1.0) -> None:
    run_dir.mkdir(exist_ok=True)
    rows = [
        {"step": n, "samples_seen": 8 * n, "loss": 400.0 - n, "step_time": 0.5, "samples_per_second": 16.0}
        | {"num_skipped": 3}
        for n in range(1, steps + 1)
    ]
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(path, (time.time() - age, time.time() - age))


def beat(run_dir: Path, rank: int = 0, age: float = 1.0, **fields: Any) -> None:
    given = Beat(time=time.time() - age, rank=rank, host="n1", pid=1, step=200, step_seconds=0.4, section="", place=0)
    facts = {} if rank else FACTS
    write_beat(run_dir, dataclasses.replace(given, **{"job": "12", "facts": facts, **fields}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two ranks in its 200th of 400 steps."""
    write_metrics(tmp_path, 200)
    for rank in (0, 1):
        beat(tmp_path, rank)
    (tmp_path / "checkpoints/step_000000150").mkdir(parents=True)
    return tmp_path


def test_a_run_that_trains(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = read_status(run_dir)
    assert (status.state, status.step, status.num_steps, status.samples_seen) == ("running", 200, 400, 1600)
    assert status.is_well
    assert status.eta_seconds == pytest.approx(200 * 0.5)
    assert status.mfu == pytest.approx(16 * 1e9 / 2e12)
    assert (status.loss, status.mean_loss) == (200.0, pytest.approx(sum(range(200, 300)) / 100))
    assert (status.num_skipped, status.checkpoint_step, status.hosts) == (3, 150, ["n1"])
    assert 0 <= status.checkpoint_seconds < 60
    assert 1 <= status.last_step_seconds < 60
    assert cli.main(["status", str(run_dir), "--json", str(run_dir / "out.json")]) == 0
    said = capsys.readouterr().out
    for text in ("running; on n1, job 12", "50.0%  step 200 of 400", "MFU 0.8%", "to go 1m 40s", "loss 200.0000"):
        assert text in said
    assert "#" * 20 + "." * 20 in said
    written = json.loads((run_dir / "out.json").read_text())
    assert (written["state"], written["is_well"]) == ("running", True)


def test_a_rank_that_is_silent_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(run_dir, 1, age=100)
    assert cli.main(["status", str(run_dir)]) == 1
    assert "! rank 1 on n1 (pid 1) is silent for 100 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "state", "why"),
    [
        ({"age": 100}, "stale", "silent for 1m 40s"),
        ({"step_seconds": 90.0, "section": "data"}, "stale", "lives, but waits in data for 1m 30s"),
        ({"step_seconds": 20.0}, "running", "on n1"),  # forty times its step, but no minute
        ({"state": "failed", "error": "OSError: disk full"}, "failed", "OSError: disk full"),
        ({"state": "hung"}, "failed", "no step came"),
        ({"state": "ended"}, "waiting", "the same command goes on"),
    ],
)
def test_states_by_the_beat_of_rank_0(run_dir: Path, change: dict[str, Any], state: str, why: str) -> None:
    beat(run_dir, 0, **change)
    status = read_status(run_dir)
    assert status.state == state
    assert why in status.why
    assert status.is_well == (state not in ("stale", "failed"))


def test_a_finished_run(run_dir: Path) -> None:
    beat(run_dir, 0, state="ended", age=10_000)
    beat(run_dir, 1, state="ended", age=10_000)
    (run_dir / "summary.json").write_text('{"status": "finished"}')
    status = read_status(run_dir)
    assert (status.state, status.silent) == ("finished", [])
    assert status.is_well


def test_attempts_tell_of_a_job_that_has_not_come_to_training(run_dir: Path) -> None:
    beat(run_dir, 0, state="ended", age=100)
    begin_attempt(run_dir, "12", "12.1", 3)
    assert read_status(run_dir).state == "starting"
    beat(run_dir, 0, age=-1)
    assert read_status(run_dir).state == "running"
    end_attempt(run_dir, 1, 3)
    beat(run_dir, 0, state="failed", error="ValueError: x", age=100)
    status = read_status(run_dir)
    assert (status.state, status.why) == ("failed", "job 12.1: failed with exit status 1 (ValueError: x)")
    assert [attempt["outcome"] for attempt in status.attempts] == ["failed"]


def test_a_job_that_died_before_its_first_beat_does_not_start_for_ever(run_dir: Path) -> None:
    begin_attempt(run_dir, "12", "12.0", 3)
    beat(run_dir, 0, state="ended", age=20_000)
    assert read_status(run_dir, time.time() + 3000).state == "starting"
    status = read_status(run_dir, time.time() + 4000)
    assert (status.state, status.is_well) == ("stale", False)
    assert "rank 0 never beat" in status.why
    assert "squeue -j 12)" in status.why


def test_a_run_of_before_heartbeats_and_a_folder_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StatusError, match="holds no run"):
        read_status(tmp_path)
    write_metrics(tmp_path, 5)
    (tmp_path / "config.yaml").write_text("train:\n  num_steps: 10\n")
    (tmp_path / "summary.json").write_text('{"status": "stopped"}')
    status = read_status(tmp_path)
    assert (status.state, status.step, status.num_steps) == ("waiting", 5, 10)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_numbers_that_json_has_not_and_damaged_files(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "samples_seen": 8, "loss": "NaN"}\nnonsense\n')
    (run_dir / "heartbeats/rank_00000.json").write_text("{")
    (run_dir / "config.yaml").write_text("{")
    cli.main(["status", str(run_dir)])
    assert "loss nan" in capsys.readouterr().out


def test_a_folder_of_none_hides_no_other(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "report").mkdir()
    damaged = run_dir / "damaged"
    damaged.mkdir()
    (damaged / "attempts.json").write_text("{")
    folders = [str(run_dir / "report"), str(damaged), str(run_dir)]
    assert cli.main(["status", *folders, "--json", str(run_dir / "out.json")]) == 1
    said = capsys.readouterr()
    assert "step 200 of 400" in said.out
    assert "report holds no run" in said.err
    assert "damaged/attempts.json" in said.err
    assert [each["step"] for each in json.loads((run_dir / "out.json").read_bytes())] == [200]
