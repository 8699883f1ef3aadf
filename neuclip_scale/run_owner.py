"""Who trains in a run folder: two processes in one would overwrite each other's work."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import psutil

from neuclip_scale.config import ConfigError
from neuclip_scale.heartbeat import BEAT_SECONDS, SILENT_SECONDS, Beat, beat_path, read_beat


def check_run_dir(run_dir: Path) -> None:
    """Make the folder of a run; raises `ConfigError` where that cannot be, or where another process trains in it."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ConfigError(
            "run_dir", str(run_dir), f"cannot be written ({error.strerror})", "Give another folder."
        ) from error
    check_trained_by_no_other(run_dir)


def check_trained_by_no_other(run_dir: Path, patience: float = 2.5 * BEAT_SECONDS) -> None:
    """Raise `ConfigError` if rank 0 of another run lives in this folder: the two would overwrite each other.

    On this host it lives if its process does; on another if it beats once more within `patience` seconds.
    """
    first = read_beat(run_dir, 0)
    here = first is not None and first.host == socket.gethostname()
    if first is None or first.state != "running" or (here and first.pid == os.getpid()):
        return
    # An earlier attempt of this job is not waited for: `begin_attempt` has looked after it. On this host it can be
    # another run of the same interactive allocation.
    if not here and first.job and first.job == os.environ.get("SLURM_JOB_ID", ""):
        return
    if _lives_here(first) if here else beats_on(run_dir, first, patience):
        raise ConfigError(
            "run_dir",
            str(run_dir),
            f"process {first.pid} on {first.host} trains it now, at step {first.step}",
            "Wait for its end, stop it, or give another run_dir.",
        )


def _lives_here(beat: Beat) -> bool:
    try:
        process = psutil.Process(beat.pid)
        # One that began after the beat has the number of a dead one; a zombie only waits to be asked for.
        return process.create_time() <= beat.time and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _age(run_dir: Path) -> float:
    """Seconds since rank 0 beat, by the clock of the storage: that of its host may be minutes off this one's."""
    with tempfile.TemporaryFile(dir=run_dir) as now:
        return os.fstat(now.fileno()).st_mtime - beat_path(run_dir, 0).stat().st_mtime


def beats_on(run_dir: Path, first: Beat, patience: float) -> Beat | None:
    """Rank 0's next beat, if it comes in time and says that it runs on."""
    deadline = time.monotonic() + (patience if _age(run_dir) < SILENT_SECONDS else 0)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 4))
        now = read_beat(run_dir, 0)
        if now is not None and now.time != first.time:
            return now if now.state == "running" else None
    return None
