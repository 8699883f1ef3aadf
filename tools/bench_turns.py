"""Contenders by turns, each measurement in a process of its own: what the sections of tools/bench.py share."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20

Runs = dict[str, list[dict[str, float]]]
"""Measurements of each contender, round after round."""


def refuse_unknown(option: str, names: Sequence[str], known: Collection[str], why: str = "") -> None:
    """Raise SystemExit where `names`, given as `option`, has none or one that is not among `known`; `why` goes with it.

    What is not known would be measured as something else, under the name given.
    """
    if not names:
        raise SystemExit(f"--{option}: no name was given. Choose from {'; '.join(known)}.")
    for name in names:
        if name not in known:
            raise SystemExit(f"--{option} {name!r}: there is no such name{why}. Choose from {'; '.join(known)}.")


def by_turns(script: str, options: Any, *extra: str) -> Runs:
    """Every one of `options.contenders` once in each of `options.repeats` rounds, so that drift falls on all.

    `script` is run with a contender, the options and `extra`; its last line is what it has measured.
    """
    runs: Runs = {name: [] for name in options.contenders}
    for repeat in range(options.repeats):
        for name in options.contenders:
            print(f"\r{repeat + 1}/{options.repeats} {name:<40}", end="", file=sys.stderr, flush=True)
            arguments = [sys.executable, script, name, json.dumps(asdict(options)), *extra]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return runs


def options_of(kind: type, text: str) -> Any:
    """Options as `by_turns` hands them to a script."""
    return kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
    )


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call, those that this process ran, and the MiB of resident memory that it added at its peak.

    With one thread the second are what a machine of its own would take: waiting for a core does not count.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before is reused, and counts for nothing
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began, ran = time.perf_counter(), time.process_time()
    action()
    seconds, ran = time.perf_counter() - began, time.process_time() - ran
    return {"seconds": seconds, "cpu_seconds": ran, "added_mib": (resident_bytes("VmHWM") - before) / MEBIBYTE}


def matmul_flops(dtype: str = "float32") -> float:
    """FLOP/s of this process in a product of 1024 by 1024 by 1024: what a step's products can reach at most.

    `dtype` is the one that torch gives this name.
    """
    import torch

    size = 1024
    left, right, out = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(3))
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for _ in range(8):
            torch.mm(left, right, out=out)
        best = min(best, (time.process_time() - began) / 8)
    return 2 * size**3 / best


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def compared(runs: Runs, peers: Mapping[str, str], figures: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each contender: the median of each figure and its range, and its ratio to the peer.

    `figures` gives the names of ratios: {"seconds": "time_ratio"}. A ratio is the median of those within a round: a
    machine that is slow for a minute is slow for both.
    """
    rows = []
    for name, each in runs.items():
        row: dict[str, Any] = {"contender": name}
        against = runs.get(peers.get(name, ""), [])
        for figure, ratio in figures.items():
            values = [run[figure] for run in each if figure in run]
            if not values:
                continue
            row[figure], row[f"{figure}_range"] = statistics.median(values), [min(values), max(values)]
            if against and figure in against[0]:
                ratios = [run[figure] / other[figure] for run, other in zip(each, against, strict=True)]
                row[ratio], row[f"{ratio}_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def with_bounds(rows: list[dict[str, Any]], runs: Runs) -> list[dict[str, Any]]:
    """The rows with the median of what the runs call `bound_seconds`, and how much of it each reaches."""
    for row in rows:
        row["bound_seconds"] = statistics.median(run["bound_seconds"] for run in runs[row["contender"]])
        row["share_of_bound"] = row["bound_seconds"] / row["cpu_seconds"]
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """The rows as text; `columns` gives each figure's heading and format: {"seconds": "time|.2f"}."""
    width = max(len(row["contender"]) for row in rows) + 2
    headings = {name: column.split("|")[0] for name, column in columns.items()}
    print(" " * width + "".join(f"{heading:>{len(heading) + 4}}" for heading in headings.values()))
    for row in rows:
        cells = []
        for name, column in columns.items():
            heading, form = column.split("|")
            cells.append(f"{format(row[name], form) if name in row else '-':>{len(heading) + 4}}")
        print(f"{row['contender']:<{width}}{''.join(cells)}")
