"""A thread of every rank that beats, and ends a rank whose steps do not come: with its stacks, and the name of the
rank that the others wait for."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from neuclip_scale.heartbeat import BEAT_SECONDS, Beat, read_beat, write_beat
from neuclip_scale.sections import running_place

EXIT_HUNG = 76
"""Exit status of a rank that waited too long for a step."""
FIRST_STEP_FACTOR = 3
"""The first step of a process may take so many times as long: it compiles, and fills caches."""
_TOLD = 8  # suspects in a message; a thousand ranks would fill a log


class HangWatch:
    """Watches the steps of one rank. No communication.

    Inside `running` the rank's heartbeat is written every `BEAT_SECONDS`. When no step has finished for
    `timeout_seconds` (0: never mind), all threads' stacks go to `RUN/stacks/rank_N.txt`, with what the other ranks do
    and which of them are the suspects, and the process ends with `EXIT_HUNG`: a collective that waits for a dead rank
    cannot be left otherwise.
    """

    def __init__(
        self, run_dir: Path, rank: int, world_size: int, timeout_seconds: float, facts: Mapping[str, float]
    ) -> None:
        self.run_dir, self.rank, self.world_size = Path(run_dir), rank, world_size
        self._facts = dict(facts) if rank == 0 else {}
        self._timeout = timeout_seconds
        self._period = min(BEAT_SECONDS, timeout_seconds / 4) if timeout_seconds else BEAT_SECONDS
        self._step, self._launched, self._since, self._first, self._paused = 0, 0, time.monotonic(), True, 0
        self._end = threading.Event()

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Watch inside this block, in which steps after `step` run."""
        self._step, self._launched, self._since, self._first = step, step, time.monotonic(), True
        self._end.clear()
        _or_tell(lambda: write_beat(self.run_dir, self._beat()))
        thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        thread.start()
        last: dict[str, Any] = {"state": "ended"}
        try:
            yield
        except BaseException as error:
            last = {"state": "failed", "error": f"{type(error).__name__}: {error}"[:1000]}
            raise
        finally:
            self._end.set()
            thread.join()
            _or_tell(lambda: write_beat(self.run_dir, replace(self._beat(), **last)))

    def launched(self, step: int) -> None:
        """A step has been launched, which may not have finished."""
        self._launched = step

    def finished(self, step: int) -> None:
        """A step has finished."""
        self._step, self._since, self._first = step, time.monotonic(), False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no step and may take its time."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._since = time.monotonic()

    def _beat(self, state: Literal["running", "hung"] = "running") -> Beat:
        section, place = running_place()
        return Beat(
            time=time.time(),
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self._step,
            step_seconds=0.0 if self._paused else time.monotonic() - self._since,
            section=section,
            place=place,
            launched=self._launched,
            state=state,
            job=os.environ.get("SLURM_JOB_ID", ""),
            facts=self._facts,
        )

    def _watch(self) -> None:
        while not self._end.wait(self._period):
            # A storage that fails for a while must not end days of training.
            _or_tell(lambda: write_beat(self.run_dir, self._beat()))
            limit = self._timeout * (FIRST_STEP_FACTOR if self._first else 1)
            waited = time.monotonic() - self._since
            if limit and not self._paused and waited > limit:
                self._give_up(waited)

    def _give_up(self, waited: float) -> None:
        beat = self._beat("hung")
        told = (
            f"rank {self.rank} on {beat.host} (pid {beat.pid}): no step for {waited:.0f} s {_place(beat)} "
            f"(train.hang_timeout_seconds={self._timeout:g})"
        )
        try:
            _or_tell(lambda: write_beat(self.run_dir, beat))
            suspects = find_suspects(self.run_dir, self.world_size, 3 * self._period)
            path = self.run_dir / "stacks" / f"rank_{self.rank:05d}.txt"
            where = _write_stacks(path, [told, *suspects])
            _write_flight_record(path.with_suffix(".nccl"))
            print(f"error: {told}. Stacks: {where}. {'; '.join(suspects[:_TOLD])}", file=sys.stderr, flush=True)
            # The first rank that leaves takes the others along by their broken connections: let them write theirs.
            time.sleep(1 + self._period)
        finally:
            os._exit(EXIT_HUNG)


def find_suspects(run_dir: Path, world_size: int, silent_after: float) -> list[str]:
    """Which ranks the others wait for, by their beats, each in words; all ranks' places where none stands out.

    All ranks go through the same sections, so those that wait are at the same place. A rank is suspect that has not
    come so far, or is silent.
    """
    now, beats, told = time.time(), {}, []
    for rank in range(world_size):
        beat = read_beat(run_dir, rank)
        if beat is None or now - beat.time > silent_after:
            who = f"rank {rank} on {beat.host} (pid {beat.pid})" if beat else f"rank {rank}"
            seen = f"silent for {now - beat.time:.0f} s{_process_state(beat)}" if beat else "it has never beaten"
            told.append(f"suspect: {who}: {seen}")
        else:
            beats[rank] = beat
    furthest = max(map(_progress, beats.values()), default=(0, 0, 0))
    behind = [beat for beat in beats.values() if _progress(beat) < furthest]
    told += [f"suspect: rank {beat.rank} on {beat.host} (pid {beat.pid}): {_place(beat)}" for beat in behind]
    return told or [f"rank {rank} on {beat.host}: {_place(beat)}" for rank, beat in beats.items()]


def _progress(beat: Beat) -> tuple[int, int, int]:
    return beat.step, beat.launched, beat.place


def _place(beat: Beat) -> str:
    if beat.section:
        where = f"in {beat.section}, place {beat.place} of step {beat.launched + 1}"
    elif beat.launched > beat.step:
        where = f"waiting for the numbers of step {beat.step + 1}"
    else:
        where = "between two steps"
    return f"after step {beat.step}, {where}"


def _process_state(beat: Beat) -> str:
    """What the kernel says of a process on this machine: `, state T (stopped)`, or that it has ended."""
    if beat.host != socket.gethostname():
        return ""
    try:
        lines = Path(f"/proc/{beat.pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return ", the process has ended"
    return "".join(f", state {line.split(None, 1)[1]}" for line in lines if line.startswith("State:"))


def _write_stacks(path: Path, head: list[str]) -> str:
    """Returns where they are: `path`, or where that cannot be written, as on a full disk, standard error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), *head, "", sep="\n", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        faulthandler.dump_traceback(2, all_threads=True)  # standard error itself, whatever Python made of it
        return f"above ({path}: {error.strerror})"
    return str(path)


def _write_flight_record(path: Path) -> None:
    """The last collectives of this rank, where torch keeps a record of NCCL's (torch's `fr_trace` reads it)."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
    except (AttributeError, RuntimeError, OSError) as error:
        print(f"no flight record: {error}", file=sys.stderr)


def _or_tell(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        print(f"heartbeat: {error}", file=sys.stderr)
