"""Names inside a checkpoint folder, which writing and reading share."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

FORMAT = 3
SHARED_FILE, CHECKSUMS_FILE, LATEST_FILE = "shared.pt", "checksums.json", "latest"
_CHUNK = 1 << 22  # bytes per read


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be trusted; the message names file and remedy."""


def step_folder(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:09d}"


def rank_file(rank: int) -> str:
    """File name of what only `rank` holds."""
    return f"rank_{rank:05d}.pt"


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Checkpoints in `folder`, whole or damaged; one whose replacement was cut short has its old name."""
    found: dict[int, Path] = {}
    # "." sorts before "s": where both are, the replacement comes last and wins.
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = re.fullmatch(r"(?:\.old-)?step_(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return found


def measure(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as checksums.json lists them; reads all of it."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}
