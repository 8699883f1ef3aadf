"""How a run stands, from its folder alone: no process, no scheduler and no torch is asked."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from neuclip_scale.heartbeat import SILENT_SECONDS, Beat, read_beat, silent_ranks
from neuclip_scale.run_attempts import Attempt, read_attempts
from neuclip_scale.run_folder import last_metrics, newest_checkpoint, read_object, summary_status
from neuclip_scale.telemetry.console import duration

RECENT = 100
"""Steps over which loss and speed are averaged."""
STALE_STEPS = 20
"""A run is stale whose next step takes so many times as long as its steps did."""
STARTING_SECONDS = 3600.0
"""A run is stale whose job has begun so long ago without a sign of life. An index of many shards can take minutes."""

State = Literal["waiting", "starting", "running", "finished", "failed", "stale"]


class StatusError(ValueError):
    """A folder that holds no run; the message says what to give."""


@dataclass(frozen=True)
class RunStatus:
    """State, progress and health of a run; 0 or empty where something is not known."""

    run_dir: str
    state: State
    """waiting: stopped, to go on later; stale: it says that it runs, but nothing comes."""
    why: str
    step: int = 0
    num_steps: int = 0
    samples_seen: int = 0
    last_step_seconds: float = 0.0
    """Age of the last line of metrics.jsonl."""
    eta_seconds: float = 0.0
    samples_per_second: float = 0.0
    mfu: float = 0.0
    loss: float = 0.0
    mean_loss: float = 0.0
    """Over the last `RECENT` steps."""
    num_skipped: int = 0
    checkpoint_step: int = 0
    checkpoint_seconds: float = 0.0
    """Age of the newest checkpoint."""
    world_size: int = 0
    hosts: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    """Ranks that should beat and do not, in words."""
    stacks: list[str] = field(default_factory=list)
    """Stacks of ranks that hung."""
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether nobody has to look after it."""
        return self.state not in ("failed", "stale") and not self.silent

    def document(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "is_well": self.is_well}


def read_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """Read a run folder; raises StatusError if it is none, AttemptsError for a damaged attempts.json."""
    run_dir, now = Path(run_dir), time.time() if now is None else now
    known = ("config.yaml", "metrics.jsonl", "attempts.json", "heartbeats", "checkpoints")
    if not any((run_dir / name).exists() for name in known):
        raise StatusError(f"{run_dir} holds no run. Give the folder that --run-dir named.")
    attempts, beat, rows = read_attempts(run_dir), read_beat(run_dir, 0), last_metrics(run_dir, RECENT)
    facts = (beat.facts if beat else {}) or {}
    num_steps = int(facts.get("num_steps", 0)) or _planned_steps(run_dir)
    world_size = int(facts.get("world_size", 0)) or int(read_object(run_dir / "environment.json").get("world_size", 0))
    metrics = run_dir / "metrics.jsonl"
    age = now - metrics.stat().st_mtime if metrics.exists() else 0.0
    step_time = _mean([row.get("step_time") for row in rows])
    state, why = _state(run_dir, attempts, beat, now, step_time)
    step = rows[-1]["step"] if rows else newest_checkpoint(run_dir)
    speed = float(rows[-1].get("samples_per_second", 0.0)) if rows else 0.0
    peak = float(facts.get("peak_flops", 0.0)) * world_size
    # Of the last step's captions where they are packed, else of one as long as the context.
    flops = float({**facts, **(rows[-1] if rows else {})}.get("flops_per_pair", 0))
    beats = [read_beat(run_dir, rank) for rank in range(world_size)]
    checkpoint = newest_checkpoint(run_dir)
    folder = run_dir / "checkpoints" / f"step_{checkpoint:09d}"
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        why=why,
        step=step,
        num_steps=num_steps,
        samples_seen=int(rows[-1].get("samples_seen", 0)) if rows else 0,
        last_step_seconds=age,
        eta_seconds=max(0, num_steps - step) * step_time,
        samples_per_second=speed,
        mfu=speed * flops / peak if peak else 0.0,
        loss=_number(rows[-1].get("loss")) if rows else 0.0,
        mean_loss=_mean([row.get("loss") for row in rows]),
        num_skipped=int(rows[-1].get("num_skipped", 0)) if rows else 0,
        checkpoint_step=checkpoint,
        checkpoint_seconds=now - folder.stat().st_mtime if folder.exists() else 0.0,
        world_size=world_size,
        hosts=sorted({each.host for each in beats if each}),
        silent=silent_ranks(run_dir, world_size, now) if state in ("running", "stale") else [],
        stacks=[str(path) for path in sorted((run_dir / "stacks").glob("rank_*.txt"))],
        attempts=[asdict(attempt) for attempt in attempts],
    )


def _state(
    run_dir: Path, attempts: list[Attempt], beat: Beat | None, now: float, step_time: float
) -> tuple[State, str]:
    last = attempts[-1] if attempts else None
    if last and last.outcome == "running" and (beat is None or beat.time < last.began):
        job = last.job.partition(".")[0]
        begun = f"job {last.job} has begun {duration(now - last.began)} ago"
        if now - last.began > STARTING_SECONDS:
            return "stale", f"{begun} and rank 0 never beat: killed, or it waits (squeue -j {job})"
        return "starting", f"{begun} and trains not yet"
    if beat and beat.state == "running":
        return _living(beat, now, step_time)
    if last and last.outcome in ("failed", "refused", "lost") and (beat is None or beat.time < last.ended):
        return "failed", f"job {last.job}: {last.outcome} with exit status {last.status}{_error(beat)}"
    if beat and beat.state in ("failed", "hung"):
        return "failed", f"rank 0 on {beat.host}: {beat.error or 'no step came (see stacks/)'}"
    if summary_status(run_dir) == "finished":
        return "finished", "as summary.json says"
    return "waiting", "saved and stopped; the same command goes on" if beat else "it has not begun"


def _living(beat: Beat, now: float, step_time: float) -> tuple[State, str]:
    age = now - beat.time
    who = f"on {beat.host}" + (f", job {beat.job}" if beat.job else "")
    if age > SILENT_SECONDS:
        return "stale", f"rank 0 {who} is silent for {duration(age)}: killed, or cut off from the storage"
    if step_time and beat.step_seconds > max(SILENT_SECONDS, STALE_STEPS * step_time):
        where = f" in {beat.section}" if beat.section else ""
        return "stale", f"rank 0 {who} lives, but waits{where} for {duration(beat.step_seconds)}"
    return "running", who


def _error(beat: Beat | None) -> str:
    return f" ({beat.error})" if beat and beat.error else ""


def _planned_steps(run_dir: Path) -> int:
    """What config.yaml says; 0 where it gives epochs."""
    try:
        document = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
        return int(document["train"]["num_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _mean(values: list[Any]) -> float:
    numbers = [_number(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else 0.0
