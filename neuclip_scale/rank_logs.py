"""One log for each rank, and one of all, from what `srun --label` prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

_LABEL = re.compile(rb" *(\d+): ?(.*)", re.DOTALL)
MERGED = "all.log"


def split_logs(lines: Iterable[bytes], folder: Path, echo: BinaryIO, header: str = "") -> int:
    """Append each line `RANK: TEXT` to `folder/rank_RANK.log`, and all lines as they are to `folder/all.log` and
    `echo`; returns how many ranks have spoken.

    A line without a label is srun's own and stands in the merged log alone. `header` begins every file. What cannot be
    written is told once for each file, and the rest goes on: a training whose output nobody takes would end with it.
    """
    first = f"{header}\n".encode() if header else b""
    ranks: dict[int, _Log] = {}
    with ExitStack() as stack:
        merged, shown = _Log(stack, Path(folder) / MERGED, first), _Log(stack, echo)
        for line in lines:
            merged.write(line)
            shown.write(line)
            match = _LABEL.fullmatch(line)
            if match is None:
                continue
            rank = int(match[1])
            if rank not in ranks:
                ranks[rank] = _Log(stack, Path(folder) / f"rank_{rank:05d}.log", first)
            ranks[rank].write(match[2])
    return len(ranks)


class _Log:
    """A file that is appended to."""

    def __init__(self, stack: ExitStack, target: Path | BinaryIO, first: bytes = b"") -> None:
        self._name, self._told = str(target) if isinstance(target, Path) else "standard output", False
        self._file: BinaryIO | None = None
        try:
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
                target = stack.enter_context(target.open("ab", buffering=0))
            self._file = target
        except OSError as error:
            self._tell(error)
        self.write(first)

    def write(self, line: bytes) -> None:
        """At once: a job may be killed at any time, and its last words are what is wanted of it."""
        if self._file is None:
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            with suppress(OSError):
                print(f"warning: {self._name}: {error.strerror}; lines are missing there", file=sys.stderr, flush=True)
