"""Attempts of a run: progress, tries in vain, and what comes next."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale import cli
from neuclip_scale.config import ConfigError, dump_recipe, load_recipe
from neuclip_scale.heartbeat import Beat, beat_path, write_beat
from neuclip_scale.run_attempts import (
    AttemptsError,
    begin_attempt,
    end_attempt,
    read_attempts,
)
from neuclip_scale.run_folder import furthest_step, last_metrics, newest_checkpoint
from neuclip_scale.run_owner import check_run_dir, check_trained_by_no_other


def log_steps(run_dir: Path, last: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, last + 1)))


def one_attempt(run_dir: Path, status: int, reaches: int = 0, tries: int = 3, submission: str = "7") -> str:
    begun, why = begin_attempt(run_dir, submission, "7.0", tries)
    assert begun == "go", why
    if reaches:
        log_steps(run_dir, reaches)
    return end_attempt(run_dir, status, tries)[0]


def test_failures_without_progress_end_the_tries(tmp_path: Path) -> None:
    assert one_attempt(tmp_path, 1, reaches=5) == "again"  # further than before: no failure in vain
    assert one_attempt(tmp_path, 1, reaches=5) == "again"
    assert one_attempt(tmp_path, 137, reaches=3) == "again"
    assert one_attempt(tmp_path, 1, reaches=5) == "stop"
    decision, why = begin_attempt(tmp_path, "7", "7.4", 3)
    assert decision == "stop"
    assert "3 attempt(s) in a row came no further than step 5 (the last: failed, exit status 1)" in why


def test_progress_and_stops_begin_the_count_anew(tmp_path: Path) -> None:
    assert [one_attempt(tmp_path, 1, reaches=5) for _ in range(3)] == ["again"] * 3
    assert one_attempt(tmp_path, 1, reaches=6) == "again"
    assert [one_attempt(tmp_path, 1) for _ in range(2)] == ["again"] * 2
    assert one_attempt(tmp_path, 75, reaches=6) == "again"
    assert [one_attempt(tmp_path, 1) for _ in range(3)] == ["again", "again", "stop"]


def test_a_checkpoint_is_progress_too(tmp_path: Path) -> None:
    assert one_attempt(tmp_path, 1, tries=1, reaches=4) == "again"
    begin_attempt(tmp_path, "7", "7.1", 1)
    (tmp_path / "checkpoints/step_000000005").mkdir(parents=True)
    assert end_attempt(tmp_path, 1, 1)[0] == "again"
    assert one_attempt(tmp_path, 1, tries=1) == "stop"


def test_a_new_submission_has_all_its_tries(tmp_path: Path) -> None:
    assert one_attempt(tmp_path, 1, tries=1) == "stop"
    assert begin_attempt(tmp_path, "7", "7.1", 1)[0] == "stop"
    assert one_attempt(tmp_path, 0, tries=1, submission="8") == "finished"
    assert begin_attempt(tmp_path, "8", "9.0", 1)[0] == "finished"  # of the same chain
    assert begin_attempt(tmp_path, "10", "10.0", 1)[0] == "go"


def test_attempts_that_never_told_their_end_are_lost(tmp_path: Path) -> None:
    assert begin_attempt(tmp_path, "7", "7.0", 2)[0] == "go"
    log_steps(tmp_path, 3)
    assert begin_attempt(tmp_path, "7", "7.1", 2)[0] == "go"
    assert begin_attempt(tmp_path, "7", "7.2", 2)[0] == "go"
    assert begin_attempt(tmp_path, "7", "7.3", 2)[0] == "stop"
    assert [(one.outcome, one.progressed) for one in read_attempts(tmp_path)] == [
        ("lost", True), ("lost", False), ("lost", False)
    ]  # fmt: skip


def test_an_attempt_that_slurm_ended_before_it_could_tell_is_no_failure(tmp_path: Path) -> None:
    assert begin_attempt(tmp_path, "7", "7.0", 1)[0] == "go"
    (tmp_path / "terminated").write_text("7.0\n")
    assert begin_attempt(tmp_path, "7", "7.1", 1)[0] == "go"
    assert begin_attempt(tmp_path, "7", "7.2", 1)[0] == "stop", "the note is of the attempt before"
    assert [attempt.outcome for attempt in read_attempts(tmp_path)] == ["stopped", "lost"]


def test_two_jobs_that_began_before_either_beat_each_note_their_own_end(tmp_path: Path) -> None:
    assert begin_attempt(tmp_path, "7", "7.0", 1)[0] == "go"
    assert begin_attempt(tmp_path, "8", "8.0", 1)[0] == "go"
    log_steps(tmp_path, 3)
    assert end_attempt(tmp_path, 2, 1, "8.0")[0] == "stop"  # it is told of the other
    log_steps(tmp_path, 5)
    assert end_attempt(tmp_path, 1, 1, "7.0")[0] == "again"
    assert [(one.job, one.outcome, one.reached, one.progressed) for one in read_attempts(tmp_path)] == [
        ("7.0", "failed", 5, True), ("8.0", "refused", 3, True)
    ]  # fmt: skip
    with pytest.raises(AttemptsError, match="has no attempt that runs"):
        end_attempt(tmp_path, 1, 1, "7.0")


def beat(run_dir: Path, job: str, state: Any = "running", age: float = 0.0) -> None:
    now = time.time() - age
    given = {"host": "n1", "pid": 1, "step": 1, "step_seconds": 1.0, "section": "", "place": 0}
    write_beat(run_dir, Beat(time=now, rank=0, state=state, job=job, **given))
    os.utime(beat_path(run_dir, 0), (now, now))


def test_a_run_that_another_job_trains_is_left_alone(tmp_path: Path) -> None:
    beats = Event()

    def other_job() -> None:
        while not beats.wait(0.05):
            beat(tmp_path, "6")

    beat(tmp_path, "6")
    thread = Thread(target=other_job)
    thread.start()
    try:
        decision, why = begin_attempt(tmp_path, "7", "7.0", 3)
        assert (decision, read_attempts(tmp_path)) == ("stop", [])
        assert "job 6 trains it now" in why
    finally:
        beats.set()
        thread.join()


@pytest.mark.parametrize(
    ("job", "state", "age"), [("6", "running", 0), ("6", "ended", 0), ("6", "running", 1e4), ("7", "running", 0)]
)
def test_a_job_that_is_dead_or_this_one_is_no_hindrance(tmp_path: Path, job: str, state: str, age: float) -> None:
    beat(tmp_path, job, state, age)
    began = time.monotonic()
    assert begin_attempt(tmp_path, "7", "7.1", 3, patience=0.4)[0] == "go"
    assert (time.monotonic() - began >= 0.4) == (job == "6" and state == "running" and not age)


def test_refused_settings_are_not_tried_again(tmp_path: Path) -> None:
    assert one_attempt(tmp_path, 2) == "stop"
    assert begin_attempt(tmp_path, "7", "7.1", 3)[0] == "stop"


def test_a_launcher_may_tell_of_a_rank_it_ended_itself(tmp_path: Path) -> None:
    begin_attempt(tmp_path, "7", "7.0", 1)
    (tmp_path / "summary.json").write_text('{"status": "stopped"}')
    assert end_attempt(tmp_path, 143, 1)[0] == "again"
    assert read_attempts(tmp_path)[-1].outcome == "stopped"
    assert one_attempt(tmp_path / "other", 143, tries=1) == "stop"


@settings(deadline=None, max_examples=20)  # it writes to the disk for good
@given(st.lists(st.tuples(st.sampled_from([1, 75, 137]), st.integers(0, 3)), max_size=12), st.integers(1, 4))
def test_tries_in_vain_against_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int]], tries: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    furthest = in_vain = 0
    for status, step in history:
        decision = one_attempt(run_dir, status, reaches=step, tries=tries)
        in_vain = in_vain + 1 if status != 75 and step <= furthest else 0
        furthest = max(furthest, step)
        assert decision == ("stop" if in_vain == tries else "again")
        if in_vain == tries:
            break


@pytest.mark.parametrize("text", ["{", "[1]", '[{"a": 1}]'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "attempts.json").write_text(text)
    with pytest.raises(AttemptsError, match=r"attempts\.json is damaged"):
        read_attempts(tmp_path)


def test_the_end_of_no_attempt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttemptsError, match="no attempt that runs"):
        end_attempt(tmp_path, 0, 3)


def test_last_metrics_of_long_torn_and_damaged_files(tmp_path: Path) -> None:
    assert last_metrics(tmp_path, 5) == []
    assert furthest_step(tmp_path) == 0
    log_steps(tmp_path, 3)
    assert [row["step"] for row in last_metrics(tmp_path, 5)] == [1, 2, 3]
    log_steps(tmp_path, 20_000)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('nonsense\n{"step": 20001, "los')
    assert [row["step"] for row in last_metrics(tmp_path, 10_000)][-3:] == [19_998, 19_999, 20_000]
    assert len(last_metrics(tmp_path, 10_000)) == 10_000
    assert furthest_step(tmp_path) == 20_000
    for name in ("step_000000007", ".old-step_000020001", ".step_9.tmp", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 20_001


def test_the_command_prints_one_word_for_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path)
    assert cli.main(["job", "begin", run, "--submission", "3", "--job", "3.0", "--tries", "1"]) == 0
    assert cli.main(["job", "end", run, "--status", "1", "--tries", "1"]) == 0
    assert cli.main(["job", "end", run, "--status", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == "go\nstop\n"
    assert "1 attempt(s) in a row came no further than step 0" in said.err


def test_check_names_the_field_and_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run_dir=runs/x", "data.train=/data"]
    assert cli.main(["job", "check", "--world-size", "128", "datacomp_xlarge", *given]) == 0
    assert capsys.readouterr().out == "runs/x\n/data\n"
    assert cli.main(["job", "check", "--world-size", "88", "datacomp_xlarge", *given]) == 2
    assert cli.main(["job", "check", "--world-size", "8", "datacomp_xlarge", "run_dir=x"]) == 2
    small = ["--gpu-memory-gib", "16", "datacomp_xlarge", *given]
    assert cli.main(["job", "check", "--world-size", "128", *small]) == 2
    assert cli.main(["job", "check", "--world-size", "1"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "data.num_streams = 1024: not a multiple of the 88 ranks. Use 704" in said.err
    assert "data.train = ''" in said.err
    assert "GiB, and a GPU has 16" in said.err


def beat_of(pid: int, host: str, at: float, **more: Any) -> Beat:
    return Beat(time=at, rank=0, host=host, pid=pid, step=7, step_seconds=0.0, section="", place=0, **more)


def test_one_process_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this host the other lives while its process does, whenever it beat last."""
    check_run_dir(tmp_path / "new" / "run")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        host, later = socket.gethostname(), time.time() + 1
        write_beat(tmp_path, beat_of(other.pid, host, later))
        with pytest.raises(ConfigError, match=rf"process {other.pid} on {host} trains it now, at step 7. Wait"):
            check_run_dir(tmp_path)
        # In an interactive allocation two runs are of one job.
        write_beat(tmp_path, beat_of(other.pid, host, later, job="8"))
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with pytest.raises(ConfigError, match="trains it now"):
            check_run_dir(tmp_path)
        write_beat(tmp_path, beat_of(other.pid, host, later, state="ended"))
        check_run_dir(tmp_path)
        write_beat(tmp_path, beat_of(other.pid, host, time.time() - 3600))  # a number that was given again
        check_run_dir(tmp_path)
        write_beat(tmp_path, beat_of(other.pid, host, later))
        other.kill()
        psutil.wait_procs([psutil.Process(other.pid)], timeout=0.1)  # dead, and nobody has asked for it yet
        check_run_dir(tmp_path)
    write_beat(tmp_path, beat_of(os.getpid(), host, later))
    check_run_dir(tmp_path)


@pytest.mark.parametrize("ahead", [0, 3600, -3600])  # seconds of the other host's clock
def test_a_run_of_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    write_beat(tmp_path, beat_of(1, "elsewhere", time.time() + ahead, job="8"))
    check_trained_by_no_other(tmp_path, 0.2)
    stop = Event()

    def go_on() -> None:
        while not stop.wait(0.02):
            write_beat(tmp_path, beat_of(1, "elsewhere", time.time() + ahead, job="8"))

    beating = Thread(target=go_on)
    beating.start()
    try:
        with pytest.raises(ConfigError, match="process 1 on elsewhere trains it now"):
            check_trained_by_no_other(tmp_path, 5)
        monkeypatch.setenv("SLURM_JOB_ID", "8")  # its own job, which `job begin` has let in
        check_trained_by_no_other(tmp_path, 5)
    finally:
        stop.set()
        beating.join()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_run_folder_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir = .*cannot be written .*Give another folder"):
        check_run_dir(tmp_path / name)


def test_a_check_before_the_queue_tells_what_would_end_the_run_on_its_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*more: str) -> tuple[int, str]:
        given = [f"run_dir={tmp_path}/run", "data.train=/nope", *more]
        status = cli.main(["job", "check", "--world-size", "1", "demo", *given])
        return status, capsys.readouterr().err

    status, said = check()
    assert status == 0
    assert "warning: data.train: shards '/nope'" in said
    (tmp_path / "file").write_text("")
    status, said = check(f"run_dir={tmp_path}/file/run")
    assert status == 2
    assert "cannot be written to" in said
    (tmp_path / "run/checkpoints/step_000000005").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(dump_recipe(load_recipe("demo", {})))
    assert check()[0] == 0
    status, said = check("resume=other/checkpoints/step_000000005")
    assert status == 2
    assert f"never come further. Copy that folder into {tmp_path}/run/checkpoints, without later ones" in said
    status, said = check("objective.name=openclip")
    assert status == 2
    assert "objective.name ('neuclip' there, 'openclip' here)" in said
    monkeypatch.setattr("neuclip_scale.commands.job.find_spec", lambda name: None)
    status, said = check("engine.name=deepspeed")
    assert status == 2
    assert "pip install 'neuclip-scale[deepspeed]'" in said
