"""srun's labelled output, one file for each rank and one for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neuclip_scale.rank_logs import split_logs


def test_lines_go_to_their_ranks_and_all_to_the_merged_log(tmp_path: Path) -> None:
    said = [b"0: a\n", b" 1: b: c\n", b"srun: error: 2: lost\n", b"10: \xff\n", b"0:\n", b"1: no end"]
    with open(tmp_path / "echo", "wb") as echo:
        assert split_logs(said, tmp_path / "logs", echo, "=== 1") == 3
        assert split_logs([b"0: d\n"], tmp_path / "logs", echo, "=== 2") == 1
    texts = {path.name: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    assert texts == {
        "rank_00000.log": b"=== 1\na\n\n=== 2\nd\n",
        "rank_00001.log": b"=== 1\nb: c\nno end",
        "rank_00010.log": b"=== 1\n\xff\n",
        "all.log": b"=== 1\n" + b"".join(said) + b"=== 2\n0: d\n",
    }
    assert (tmp_path / "echo").read_bytes() == b"".join(said) + b"0: d\n"


def test_a_log_that_cannot_be_written_does_not_end_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a full disk a training would end by its broken output, and its last words with it."""
    (tmp_path / "all.log").symlink_to("/dev/full")
    (tmp_path / "rank_00001.log").mkdir()
    with open(tmp_path / "echo", "wb") as echo:
        assert split_logs([b"0: a\n", b"1: b\n", b"0: c\n", b"1: d\n"], tmp_path, echo) == 2
    assert (tmp_path / "echo").read_bytes() == b"0: a\n1: b\n0: c\n1: d\n"
    assert (tmp_path / "rank_00000.log").read_bytes() == b"a\nc\n"
    assert capfd.readouterr().err.splitlines() == [
        f"warning: {tmp_path}/all.log: No space left on device; lines are missing there",
        f"warning: {tmp_path}/rank_00001.log: Is a directory; lines are missing there",
    ]
    with open("/dev/full", "wb", buffering=0) as echo:
        assert split_logs([b"0: a\n"], tmp_path / "more", echo) == 1
    assert (tmp_path / "more/all.log").read_bytes() == b"0: a\n"


def test_the_command_copies_at_once_and_survives_the_signals_that_end_a_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neuclip_scale", "job", "logs", str(tmp_path), "--header", "now"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"3: first\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"3: first\n"
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process.pid, number)
        time.sleep(0.2)
        rest, _ = process.communicate(b"3: last\n", timeout=30)
    assert (process.returncode, rest) == (0, b"3: last\n")
    assert (tmp_path / "rank_00003.log").read_text() == "now\nfirst\nlast\n"
