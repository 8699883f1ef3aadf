"""A reshard that is killed, or whose workers are, goes on to the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from reshard_helpers import (
    contents,
    finished,
    outputs,
    run,
    simple_pool,
    start,
    uid_of,
    write_subset,
    write_tar,
)

KILLED_COMMAND = """
import os, random, sys, threading, time
from neuclip_scale.commands import reshard
delay = float(sys.argv[1])
# Killed from inside: the moments are those of the work, not of the interpreter's start.
threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), 9)), daemon=True).start()
sys.exit(reshard.main(sys.argv[2:]))
"""


def test_killed_at_random_moments_it_goes_on_to_equal_bytes(tmp_path: Path) -> None:
    """16 kills in all: in each round the same command runs until a kill, again and again, until it ends."""
    shards = simple_pool(tmp_path / "pool", 4, 60)
    write_tar(tmp_path / "pool/00009.tar", [(f"{'long' * 30}{i}", {"txt": b"x" * i}) for i in range(40)])
    subset = write_subset(tmp_path / "s.npy", [s.uid for row in shards for s in row if s.uid][::2] * 2 + [uid_of("no")])
    common = list(map(str, ["-i", tmp_path / "pool", "-s", subset, "--shard-size", 4, "--shuffle", "--allow-missing"]))
    assert run(*common, "-o", tmp_path / "whole", "-j", 1) == 0
    rng, kills, rounds = random.Random(1), 0, 0
    while kills < 16:
        out, rounds = tmp_path / f"killed{rounds}", rounds + 1
        for _ in range(40):
            command = [
                sys.executable,
                "-c",
                KILLED_COMMAND,
                str(rng.uniform(0.001, 0.5)),
                *common,
                "-o",
                str(out),
                "-j",
                "1",
            ]
            status = subprocess.run(command, capture_output=True, text=True, check=False)
            assert status.returncode in (0, -signal.SIGKILL), status.stderr
            kills += status.returncode == -signal.SIGKILL
            if status.returncode == 0:
                break
        assert run(*common, "-o", out, "-j", 1, "--verify") == 0
        assert contents(out) == contents(tmp_path / "whole")


def test_a_kill_between_a_report_and_its_name_leaves_nothing(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1]
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "sizes.json":
            os._exit(9)
        replace(source, target)

    if (child := os.fork()) == 0:
        os.replace = killed
        run(*common)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list((tmp_path / "out").glob(".sizes.json.*.tmp"))
    assert run(*common) == 0
    assert run(*common[:2], "-o", tmp_path / "whole", "-j", 1) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool", 4, 200)
    common = ["-i", tmp_path / "pool", "--shard-size", 2]
    process = start(*common, "-o", tmp_path / "out", "-j", 2)
    for _ in range(400):
        if outputs(tmp_path / "out"):
            break
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
        for pid in children
    ):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    assert run(*common, "-o", tmp_path / "out", "-j", 1) == 0
    assert run(*common, "-o", tmp_path / "whole", "-j", 1) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_workers_killed_at_random_moments_go_on_to_equal_bytes(tmp_path: Path) -> None:
    """The parent with its workers, then one worker alone."""
    shards = simple_pool(tmp_path / "pool", 4, 60)
    subset = write_subset(tmp_path / "s.npy", [s.uid for row in shards for s in row if s.uid][::2])
    common = list(map(str, ["-i", tmp_path / "pool", "-s", subset, "--shard-size", 2, "--shuffle"]))
    assert run(*common, "-o", tmp_path / "whole", "-j", 1) == 0
    out, rng = tmp_path / "out", random.Random(2)
    for moment in (0.3, rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.9)):
        command = [sys.executable, "-c", KILLED_COMMAND, str(moment), *common, "-o", str(out), "-j", "2"]
        status = subprocess.run(command, capture_output=True, text=True, check=False)
        assert status.returncode in (0, -signal.SIGKILL), status.stderr
    process, deadline = start(*common, "-o", tmp_path / "two", "-j", 2), time.monotonic() + 60
    while not outputs(tmp_path / "two") and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    killed = next(pid for pid in workers if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(int(killed), signal.SIGKILL)
    status, text = finished(process)
    assert status == 1
    assert "a worker was killed" in text
    for folder in (out, tmp_path / "two"):
        assert run(*common, "-o", folder, "-j", 2, "--verify") == 0
        assert contents(folder) == contents(tmp_path / "whole")
