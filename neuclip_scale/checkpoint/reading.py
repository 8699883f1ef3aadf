"""Finding, verifying and loading checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neuclip_scale.checkpoint.layout import (
    CHECKSUMS_FILE,
    FORMAT,
    SHARED_FILE,
    CheckpointError,
    checkpoints_by_step,
    measure,
    rank_file,
)

log = logging.getLogger(__name__)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose checksums all hold; None if there is none. No communication.

    Damaged ones are reported by a warning and passed over, not deleted. Reads every byte of the one it
    returns: call it on one rank and broadcast the answer.
    """
    for _, path in sorted(checkpoints_by_step(Path(folder)).items(), reverse=True):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
        else:
            return path
    return None


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check size and sha256 of every file of checkpoint `path` and return its checksums.json.

    Raises CheckpointError naming the first missing or damaged file.
    """
    checksums = read_checksums(Path(path))
    for name in checksums["files"]:
        _verify_file(Path(path), name, checksums)
    return checksums


def load_checkpoint(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read checkpoint `path` onto the CPU: what all ranks share, and the part of `rank`. No communication.

    The second is None when the run that saved had no such rank. Verifies the files it reads; raises
    CheckpointError.
    """
    path = Path(path)
    checksums = read_checksums(path)
    own = _load(path, rank_file(rank), checksums) if rank < checksums["world_size"] else None
    return _load(path, SHARED_FILE, checksums), own


def load_all_ranks(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read checkpoint `path` onto the CPU: what all ranks share, and every rank's part in rank order.

    For going on with another number of ranks. Verifies the files; raises CheckpointError. No communication.
    """
    path = Path(path)
    checksums = read_checksums(path)
    ranks = [_load(path, rank_file(rank), checksums) for rank in range(checksums["world_size"])]
    return _load(path, SHARED_FILE, checksums), ranks


def read_checksums(path: Path) -> dict[str, Any]:
    """checksums.json of checkpoint `path`; raises CheckpointError. Does not look at the files it lists."""
    file = path / CHECKSUMS_FILE
    try:
        checksums = json.loads(file.read_text("utf-8"))
        version, num_ranks, files = checksums["format"], int(checksums["world_size"]), checksums["files"]
        needed = {SHARED_FILE, *map(rank_file, range(num_ranks))}
        complete = needed == set(files) and all({"size", "sha256"} <= set(entry) for entry in files.values())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing. Give a folder like RUN/checkpoints/step_000001000.") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is unreadable ({error!r}). Use another checkpoint.") from error
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version!r}, not {FORMAT}. Use the neuclip-scale that wrote it.")
    if not complete:
        raise CheckpointError(f"{file} does not list exactly {sorted(needed)}. Use another checkpoint.")
    return dict(checksums)


def _verify_file(path: Path, name: str, checksums: Mapping[str, Any]) -> None:
    expected, problem = checksums["files"][name], ""
    try:
        size = (path / name).stat().st_size
        if size != expected["size"]:  # tells a truncated file without reading it
            problem = f"has {size} bytes, not {expected['size']}"
        elif measure(path / name)["sha256"] != expected["sha256"]:
            problem = "does not match its sha256"
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise CheckpointError(f"{path / name} {problem}. Use another checkpoint.")


def _load(path: Path, name: str, checksums: Mapping[str, Any]) -> dict[str, Any]:
    _verify_file(path, name, checksums)
    try:
        content = torch.load(path / name, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, and torch's advice to turn weights_only off must not reach the user
        kind = type(error).__name__
        raise CheckpointError(f"{path / name} is refused: not plain tensors and values ({kind}).") from error
    return dict(content)
