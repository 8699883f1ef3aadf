"""What is complete: an append-only file a run, on the disk before the shard it speaks of has its name."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuclip_scale.files import sync_folder
from neuclip_scale.reshard.copying import CopiedShard
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.state import FOLDER

_IN_USE = (BlockingIOError, PermissionError)


class Journal:
    """One process's journal; any number of others are read beside it.

    A line is written and flushed before the file it names appears. So a file with a final name that no journal knows
    is not ours, and a journal line without a file is work to do again.
    """

    def __init__(self, folder: Path, digest: str, name: str) -> None:
        """Open `.reshard/journal-NAME.jsonl` for appending; raises `ReshardError` if another process has it open."""
        self._digest = digest
        self._path = folder / FOLDER / f"journal-{name}.jsonl"
        is_new = not self._path.exists()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except _IN_USE as error:
            os.close(self._descriptor)
            raise ReshardError(f"{self._path}: another process is at this work. Wait for it, or stop it.") from error
        except OSError:  # a file system without locks: nobody can be kept out
            self.locked = False
        else:
            self.locked = True
        self._drop_torn_line()
        if is_new:
            sync_folder(self._path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, **entry: Any) -> None:
        """Write one line and wait until it is on the disk."""
        line = (json.dumps({"plan": self._digest, **entry}) + "\n").encode()
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def _drop_torn_line(self) -> None:
        """Cut what a kill or a full disk left without its end."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)


def read_journals(folder: Path, digest: str) -> tuple[dict[int, CopiedShard], set[str]]:
    """Output shards and names of reports that any journal in an output folder tells of.

    Raises `ReshardError` for a journal of another plan, or one that is damaged.
    """
    copied: dict[int, CopiedShard] = {}
    reports: set[str] = set()
    for path in sorted((folder / FOLDER).glob("journal-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:  # what has no end of line was never finished
            try:
                entry = json.loads(line)
                plan, report = entry.pop("plan"), entry.pop("report", None)
                shard = None if report else CopiedShard(**entry)
            except (ValueError, TypeError, KeyError) as error:
                raise ReshardError(f"{path}: a line cannot be read ({error}). Begin anew in another folder.") from error
            if plan != digest:
                raise ReshardError(f"{path}: belongs to plan {plan}, not to {digest}. Begin anew in another folder.")
            if shard is None:
                reports.add(report)
            else:
                shard.corrupt = [(name, key, reason) for name, key, reason in shard.corrupt]
                copied[shard.number] = shard
    return copied, reports


def entry_of(shard: CopiedShard) -> dict[str, Any]:
    """Fields of a journal line."""
    return asdict(shard)
