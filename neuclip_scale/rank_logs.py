"""One log for each rank, and one of all, from what `srun --label` prints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

_LABEL = re.compile(rb" *(\d+): ?(.*)", re.DOTALL)
MERGED = "all.log"


def split_logs(lines: Iterable[bytes], folder: Path, echo: BinaryIO, header: str = "") -> int:
    """Append each line `RANK: TEXT` to `folder/rank_RANK.log`, and all lines as they are to `folder/all.log` and
    `echo`; returns how many ranks have spoken.

    A line without a label is srun's own and stands in the merged log alone. `header` begins every file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    first = f"{header}\n".encode() if header else b""
    ranks: dict[int, BinaryIO] = {}
    with ExitStack() as stack:
        merged = _open(stack, Path(folder) / MERGED, first)
        for line in lines:
            _write(merged, line)
            _write(echo, line)
            match = _LABEL.fullmatch(line)
            if match is None:
                continue
            rank = int(match[1])
            if rank not in ranks:
                ranks[rank] = _open(stack, Path(folder) / f"rank_{rank:05d}.log", first)
            _write(ranks[rank], match[2])
    return len(ranks)


def _open(stack: ExitStack, path: Path, first: bytes) -> BinaryIO:
    file = stack.enter_context(path.open("ab", buffering=0))
    file.write(first)
    return file


def _write(file: BinaryIO, line: bytes) -> None:
    """At once: a job may be killed at any time, and its last words are what is wanted of it."""
    file.write(line)
    file.flush()
