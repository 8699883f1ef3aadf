"""Every start of a run: what it went on with, and what the process before it had done in vain.

config.yaml and environment.json are of the last start. That an earlier part of a run was trained with another recipe or
other code, RUN/starts.jsonl alone tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neuclip_scale.config import ConfigError
from neuclip_scale.files import json_ready, write_text

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True)
class Lost:
    """Steps that were trained and then lost, for no checkpoint held them; of all starts so far."""

    steps: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """What summary.json holds of it beside the cost of the steps that were kept."""
        return {
            "lost_steps": self.steps,
            "lost_seconds": self.seconds,
            "lost_device_hours": self.device_seconds / 3600,
        }


@dataclass(frozen=True)
class Start:
    """One start."""

    step: int
    """Steps that the run had made before."""
    changed: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted fields of the recipe in which it is not that of the checkpoint: value there, value since."""
    environment: dict[str, Any] = field(default_factory=dict)
    lost: Lost = Lost()


def read_starts(run_dir: Path) -> list[Start]:
    """The starts that made what the run is, the oldest first; none where nothing was recorded.

    Raises `ConfigError` for a file that is damaged, OSError.
    """
    path = Path(run_dir) / STARTS_FILE
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [Start(**{**entry, "lost": Lost(**entry["lost"])}) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        problem = f"the history of its starts is damaged ({error})"
        raise ConfigError("run_dir", str(path), problem, "Remove it: no more than that history is lost.") from error


def lost_so_far(run_dir: Path) -> Lost:
    """What all processes before the last start had lost."""
    starts = read_starts(run_dir)
    return starts[-1].lost if starts else Lost()


def note_start(
    run_dir: Path,
    step: int,
    environment: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    lost: tuple[int, float],
) -> Start:
    """Record a start after `step` steps; `lost` are steps and seconds that metrics.jsonl held beyond it.

    Starts at `step` or later made no part of what goes on here, and are left out.
    """
    starts = read_starts(run_dir)
    before = starts[-1] if starts else Start(step)
    devices = int(before.environment.get("world_size", 1))
    total = Lost(
        before.lost.steps + lost[0], before.lost.seconds + lost[1], before.lost.device_seconds + lost[1] * devices
    )
    start = Start(step, {name: list(values) for name, values in changed.items()}, dict(environment), total)
    kept = [*(each for each in starts if each.step < step), start]
    lines = [json.dumps(json_ready(asdict(each)), allow_nan=False) for each in kept]
    write_text(Path(run_dir) / STARTS_FILE, "\n".join(lines) + "\n")
    return start
