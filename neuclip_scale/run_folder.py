"""What a run folder tells without torch, while a run writes it or long after: steps, metrics, results."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

_TAIL = 1 << 16
"""Bytes read at a time from the end of metrics.jsonl, whose lines are far shorter."""


def furthest_step(run_dir: Path) -> int:
    """The highest step among checkpoints and lines of metrics.jsonl; 0 before any."""
    last = last_metrics(run_dir, 1)
    return max(newest_checkpoint(run_dir), last[0]["step"] if last else 0)


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest checkpoint, which has not been verified; 0 where there is none."""
    folder = Path(run_dir) / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # `.old-` is one whose replacement was cut short.
    found = [re.fullmatch(r"(?:\.old-)?step_(\d+)", name) for name in names]
    return max((int(match[1]) for match in found if match), default=0)


def last_metrics(run_dir: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole lines of metrics.jsonl, fewer where there are no more; a damaged line is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size, wanted = file.seek(0, os.SEEK_END), _TAIL
        while True:
            file.seek(max(0, size - wanted))
            lines = file.read(wanted).split(b"\n")
            if wanted >= size or len(lines) > count + 1:
                break
            wanted *= 4
    # The first may be cut; what follows the last newline is not whole yet.
    rows = [_row(line) for line in lines[0 if wanted >= size else 1 : -1]]
    return [row for row in rows if row][-count:]


def row_of_step(path: Path, step: int) -> dict[str, Any]:
    """The line of metrics.jsonl or evaluations.jsonl that is of `step`; empty where there is none."""
    try:
        with open(path, "rb") as file:
            return next((row for row in map(_row, file) if row.get("step") == step), {})
    except OSError:
        return {}


def _row(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file or it holds none."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def summary_status(run_dir: Path) -> str:
    """`finished` or `stopped`, as summary.json says; empty before there is one."""
    return str(read_object(Path(run_dir) / "summary.json").get("status", ""))
