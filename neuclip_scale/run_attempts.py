"""The attempts of a run on a cluster: which made progress, and when it is time to stop trying.

`RUN/attempts.json` has one entry for every job, or start of a requeued job, that worked on the run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from neuclip_scale.files import write_json
from neuclip_scale.heartbeat import BEAT_SECONDS, read_beat
from neuclip_scale.run_folder import furthest_step, newest_checkpoint, summary_status
from neuclip_scale.run_owner import beats_on

ATTEMPTS_FILE = "attempts.json"
TERMINATED_FILE = "terminated"
EXIT_STOPPED, EXIT_USAGE = 75, 2
"""What `neuclip train` ends with after a save on a signal, and for a recipe that cannot be run."""

Outcome = Literal["running", "finished", "stopped", "failed", "refused", "lost"]
Decision = Literal["go", "again", "finished", "stop"]


class AttemptsError(ValueError):
    """An attempts.json that cannot be read; the message names it and the remedy."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    submission: str
    """What was submitted as one: a job with its requeues, or a chain of jobs."""
    job: str
    began: float
    """Seconds since 1970."""
    reached: int
    """The furthest step that the run had come to by the end of it; until then, by its beginning."""
    progressed: bool = False
    """Whether that was further than ever before."""
    outcome: Outcome = "running"
    """lost: it never told how it ended, as when a node fails."""
    ended: float = 0.0
    status: int = 0
    """Exit status of the training."""


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts, the oldest first; raises AttemptsError."""
    path = Path(run_dir) / ATTEMPTS_FILE
    if not path.exists():
        return []
    try:
        return [Attempt(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise AttemptsError(f"{path} is damaged: {error}. Remove it: only the counting of attempts is lost.") from error


def begin_attempt(
    run_dir: Path, submission: str, job: str, tries: int, patience: float = 2.5 * BEAT_SECONDS
) -> tuple[Decision, str]:
    """Note the start of an attempt; returns go, finished or stop, and why in words.

    `finished` and `stop` are for jobs of a chain whose predecessor came to the end, or gave up; `stop` also for a run
    that another job trains: if rank 0 of one beat lately, the next beat is awaited for `patience` seconds.
    """
    if alive := _trained_elsewhere(run_dir, job, patience):
        return "stop", f"job {alive} trains it now. Wait for its end, cancel it, or give another run_dir"
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].outcome == "running":
        outcome: Outcome = "stopped" if _was_terminated(run_dir, attempts[-1].job) else "lost"
        attempts[-1] = _closed(attempts[-1], run_dir, outcome, 0)
        _write(run_dir, attempts)
    own = [attempt for attempt in attempts if attempt.submission == submission]
    if own and own[-1].outcome == "finished":
        return "finished", f"job {own[-1].job} has finished this run"
    if own and own[-1].outcome == "refused":
        return "stop", f"job {own[-1].job} was refused its settings (exit status {own[-1].status})"
    if (count := _in_vain(own)) >= tries:
        return "stop", _told_off(count, own[-1])
    reached = max([furthest_step(run_dir), *(attempt.reached for attempt in attempts)])
    _write(run_dir, [*attempts, Attempt(submission, job, time.time(), reached)])
    return "go", f"attempt {len(own) + 1} of submission {submission}, from step {newest_checkpoint(run_dir)}"


def _was_terminated(run_dir: Path, job: str) -> bool:
    """Whether its script noted Slurm's TERM (slurm/in_job.sh) before it was killed: a preemption is no failure."""
    try:
        return (Path(run_dir) / TERMINATED_FILE).read_text("utf-8").strip() == job
    except OSError:
        return False


def _trained_elsewhere(run_dir: Path, job: str, patience: float) -> str:
    """Id of another job whose rank 0 beats; empty where none does."""
    first = read_beat(run_dir, 0)
    if first is None or first.state != "running" or not first.job or first.job == job.partition(".")[0]:
        return ""
    now = beats_on(run_dir, first, patience)
    return now.job if now else ""


def end_attempt(run_dir: Path, status: int, tries: int, job: str = "") -> tuple[Decision, str]:
    """Note how the attempt of `job` has ended, without it the last; returns finished, again or stop, and why in words.

    Another job may have begun meanwhile, and taken an attempt that did not beat yet for lost.
    """
    attempts = read_attempts(run_dir)
    job = job or (attempts[-1].job if attempts else "")
    number = max((number for number, attempt in enumerate(attempts) if attempt.job == job), default=-1)
    if number < 0 or attempts[number].outcome not in ("running", "lost"):
        raise AttemptsError(f"{run_dir / ATTEMPTS_FILE} has no attempt that runs. `neuclip job begin` notes one.")
    ended = attempts[number]
    last = attempts[number] = _closed(ended, run_dir, _outcome(run_dir, ended, status), status)
    _write(run_dir, attempts)
    if last.outcome == "finished":
        return "finished", "the run has finished"
    if last.outcome == "refused":
        return "stop", "the settings were refused (exit status 2), which another try would not change"
    if last.outcome == "stopped":
        return "again", f"saved and stopped at step {last.reached}"
    count = _in_vain([attempt for attempt in attempts if attempt.submission == last.submission])
    if count >= tries:
        return "stop", _told_off(count, last)
    lead = f"failed with exit status {status} at step {last.reached}"
    return "again", f"{lead}; tries without progress: {count} of {tries}"


def _closed(attempt: Attempt, run_dir: Path, outcome: Outcome, status: int) -> Attempt:
    now = furthest_step(run_dir)
    reached = max(attempt.reached, now)
    return replace(
        attempt,
        outcome=outcome,
        ended=time.time(),
        status=status,
        reached=reached,
        progressed=attempt.progressed or reached > attempt.reached,
    )


def _outcome(run_dir: Path, attempt: Attempt, status: int) -> Outcome:
    if status == 0:
        return "finished"
    if status == EXIT_USAGE:
        return "refused"
    # A launcher tells of one rank only, perhaps of one that it has ended when others were gone.
    summary = Path(run_dir) / "summary.json"
    saved = summary.exists() and summary.stat().st_mtime >= attempt.began and summary_status(run_dir) == "stopped"
    return "stopped" if status == EXIT_STOPPED or saved else "failed"


def _in_vain(attempts: list[Attempt]) -> int:
    """How many of the last attempts failed one after the other without coming further."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.outcome not in ("failed", "lost") or attempt.progressed:
            break
        count += 1
    return count


def _told_off(count: int, last: Attempt) -> str:
    return (
        f"{count} attempt(s) in a row came no further than step {last.reached} (the last: {last.outcome}, exit status "
        f"{last.status}). Mend the cause, which the logs of the ranks tell, and submit again"
    )


def _write(run_dir: Path, attempts: list[Attempt]) -> None:
    write_json(Path(run_dir) / ATTEMPTS_FILE, [asdict(attempt) for attempt in attempts])
