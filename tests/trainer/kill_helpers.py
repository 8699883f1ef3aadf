"""What must hold of a folder of checkpoints after the process that wrote them was killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from neuclip_scale.checkpoint import latest_checkpoint, verify_checkpoint


def rest_of(reports: Connection) -> list[int]:
    """What the killed process had sent before it died."""
    found = []
    while True:
        try:
            found.append(reports.recv())
        except EOFError:
            return found


def was_interrupted(folder: Path) -> bool:
    """Whether the kill hit a save in progress."""
    return any(path.name.startswith(".") for path in folder.iterdir())


def newest_of_intact(folder: Path) -> Path:
    """The newest checkpoint; a kill tears none, not even one about to be deleted."""
    for path in folder.glob("step_*"):
        verify_checkpoint(path)
    newest = latest_checkpoint(folder)
    assert newest is not None
    return newest
