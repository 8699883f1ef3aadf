"""What metrics.jsonl and evaluations.jsonl tell, read line by line.

Lines that a kill or a bad disk damaged are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from neuclip_scale.untrusted_text import number, plain, printable


class Step(NamedTuple):
    """One training step; None where the line does not say."""

    samples_seen: float | None
    loss: float | None
    seconds: float | None
    digest: str | None
    """Of the uids of its batch."""
    contents: str | None
    """Of the pictures' files and captions read under them."""


@dataclass
class Steps:
    """The steps of a run, by number in rising order, and what the lines say beside them."""

    by_number: dict[int, Step] = field(default_factory=dict)
    evaluations: dict[str, dict[int, float]] = field(default_factory=dict)
    """Name as `zeroshot/top1` -> step -> score; in metrics.jsonl it begins with `eval/`."""
    peak_memory_bytes: float | None = None
    num_skipped: float | None = None
    """Samples skipped until the last step."""

    @property
    def last(self) -> int:
        """The last step; 0 without any."""
        return max(self.by_number, default=0)


def read_steps(path: Path) -> tuple[Steps, list[str]]:
    """The steps in a metrics.jsonl, and what is wrong with the file; raises OSError."""
    steps = Steps()
    damaged: list[tuple[int, str]] = []
    repeated = 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line_number, line in enumerate(lines, start=1):
            record = _record(line)
            if record is None:
                damaged.append((line_number, line))
                continue
            repeated += record["step"] in steps.by_number and "loss" in record
            _add(steps, record)
    steps.by_number = dict(sorted(steps.by_number.items()))
    return steps, _problems(path, steps, damaged, repeated)


def read_evaluations(path: Path) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Name as `zeroshot/top1` -> step -> score of an evaluations.jsonl, and what is wrong with it; raises OSError."""
    scores: dict[str, dict[int, float]] = {}
    damaged: list[tuple[int, str]] = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line_number, line in enumerate(lines, start=1):
            record = _record(line)
            sets = record.get("evaluation") if record else None
            if record is None or not isinstance(sets, dict):
                damaged.append((line_number, line))
                continue
            for name, score in _scores(sets):
                scores.setdefault(name, {})[record["step"]] = score
    return scores, _damage(printable(str(path)), damaged, "the scores of a step in JSON")


def _scores(tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a nested object by their path."""
    rest: list[tuple[str, Any]] = list(tree.items())
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{name}/{key}", item) for key, item in value.items()]
        elif (score := number(value)) is not None:
            yield printable(name), score


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    # Bounded, as steps are counted up to the last: a flipped bit must not ask for 10^15 of them.
    return record if type(step) is int and 0 < step < 10**12 else None


def _add(steps: Steps, record: dict[str, Any]) -> None:
    step = record["step"]
    digest, contents = record.get("batch_digest"), record.get("content_digest")
    if "loss" in record or digest is not None:  # an evaluation may have a line of its own
        steps.by_number[step] = Step(
            number(record.get("samples_seen")),
            number(record.get("loss")),
            number(record.get("step_time")),
            plain(digest) if isinstance(digest, str) else None,
            plain(contents) if isinstance(contents, str) else None,
        )
    for name, value in record.items():
        score = number(value) if name.startswith("eval/") else None
        if score is not None:
            steps.evaluations.setdefault(printable(name.removeprefix("eval/")), {})[step] = score
    memory, skipped = number(record.get("peak_memory_bytes")), number(record.get("num_skipped"))
    if memory is not None:
        steps.peak_memory_bytes = max(memory, steps.peak_memory_bytes or 0.0)
    steps.num_skipped = steps.num_skipped if skipped is None else skipped


def _problems(path: Path, steps: Steps, damaged: list[tuple[int, str]], repeated: int) -> list[str]:
    problems: list[str] = []
    name = printable(str(path))
    problems += _damage(name, damaged, "a step in JSON")
    if not steps.by_number:
        problems.append(f"{name}: holds no step. Its curve and the order of its data are unknown; restore the file.")
        return problems
    missing = steps.last - len(steps.by_number)
    if missing:
        problems.append(f"{name}: {missing} of the steps up to {steps.last} have no line. Restore the file.")
    if repeated:
        problems.append(f"{name}: {repeated} step(s) stand there twice; the later line is used. Restore the file.")
    return problems


def _damage(name: str, damaged: Sequence[tuple[int, str]], what: str) -> list[str]:
    """The sentence about lines (number, text) that are not `what`, if there are any."""
    if not damaged:
        return []
    line_number, line = damaged[0]
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return [
        f"{name}, line {line_number}{more}: not {what} ({printable(line.rstrip())[:40]!r}); left out. "
        "A kill leaves such a line, which resuming the run cuts off; elsewhere restore the file."
    ]
