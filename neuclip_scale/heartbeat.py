"""Signs of life of a run's ranks: small files in the run folder, which anyone who reads the folder may look at.

`RUN/heartbeats/rank_00000.json` is replaced every few seconds by a thread of that rank, so it tells that the process
lives; the step in it tells whether it gets on.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

BEAT_SECONDS = 10.0
"""Between two beats of a rank, at most."""
SILENT_SECONDS = 6 * BEAT_SECONDS
"""A rank that has not beaten for so long is dead, stopped, or cut off from the storage."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    time: float
    """Seconds since 1970, by the rank's own clock."""
    rank: int
    host: str
    pid: int
    step: int
    """Steps that have finished: the host has read their numbers."""
    step_seconds: float
    """Since the last of them; 0 while nothing is expected to finish, as during an evaluation."""
    section: str
    """Innermost section of the step that runs; empty between steps."""
    place: int
    """How many times the step has passed from one section to another."""
    launched: int = 0
    """Steps that the host has launched. It waits for numbers of one of them where no section runs."""
    state: Literal["running", "ended", "failed", "hung"] = "running"
    error: str = ""
    job: str = ""
    """Id of the Slurm job, empty without Slurm."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of rank 0: num_steps, world_size, global_batch_size, flops_per_pair, peak_flops (of a device; 0 unknown)."""


def beat_path(run_dir: Path, rank: int) -> Path:
    """Where `rank` beats."""
    return Path(run_dir) / "heartbeats" / f"rank_{rank:05d}.json"


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Replace a rank's beat; not flushed to the disk, for after a power cut it tells nothing."""
    path = beat_path(run_dir, beat.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(asdict(beat)), "utf-8")
    os.replace(partial, path)


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """The last beat of `rank`; None where there is none that can be read."""
    try:
        found = json.loads(beat_path(run_dir, rank).read_text("utf-8"))
        return Beat(**{item.name: found[item.name] for item in fields(Beat) if item.name in found})
    except (OSError, ValueError, TypeError):
        return None


def silent_ranks(run_dir: Path, world_size: int, now: float | None = None) -> list[str]:
    """Ranks without a beat in the last `SILENT_SECONDS`, each in words."""
    now = time.time() if now is None else now
    told = []
    for rank in range(world_size):
        beat = read_beat(run_dir, rank)
        if beat is None:
            told.append(f"rank {rank} has never beaten")
        elif beat.state == "running" and now - beat.time > SILENT_SECONDS:
            told.append(f"rank {rank} on {beat.host} (pid {beat.pid}) is silent for {now - beat.time:.0f} s")
    return told
