"""The lines in which ranks tell the judge what they found."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass, field
from typing import Any

MARK = "PREFLIGHT "
_LINE = re.compile(rf"(?: *\d+: ?)?{MARK}(\{{.*\}})\s*")


@dataclass(frozen=True)
class Report:
    """What one rank says of one thing."""

    rank: int
    node: str
    name: str
    """What was probed: hello, versions, GPU, storage, data, join, clock, ..."""
    problem: str = ""
    """What is wrong; empty when nothing is."""
    detail: str = ""
    """What was found, for people."""
    values: dict[str, Any] = field(default_factory=dict)
    """What the judge compares between nodes."""


def node_name() -> str:
    """This node as Slurm calls it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def to_line(report: Report) -> str:
    """One line without its end."""
    return MARK + json.dumps(report.__dict__)


def from_line(line: str) -> Report | None:
    """The report in a line, which `srun --label` may have labelled; None where it is none."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    try:
        return Report(**json.loads(match[1]))
    except (ValueError, TypeError):
        return None
