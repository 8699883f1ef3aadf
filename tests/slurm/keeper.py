"""Parent of a cluster's daemons, a process of its own: once the tests are gone, however that came, nothing stays.

    python keeper.py        stdin: a JSON list of arguments a line, stdout: the pid it was started as

A job's processes leave their session and their parent, as daemons do. This process adopts them (it is a subreaper), so
all that a cluster has started is below it, and ends with it when stdin is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL, whatever has ended meanwhile."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _reap(*_: Any) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> None:
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, _reap)
    started = []
    for line in sys.stdin:
        argv = json.loads(line)
        # In the foreground: a daemon that leaves its parent could outlive it. Its log is a file of its own.
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_parent)
        started.append(process)
        print(process.pid, flush=True)
    while below := psutil.Process().children(recursive=True):
        kill_all(below)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
