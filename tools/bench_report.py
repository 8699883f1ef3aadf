"""A plot and Markdown tables of a benchmark's JSON: `python tools/bench.py report RESULT.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Print every table of a result as Markdown, and draw its figures."""

    result: Annotated[str, tyro.conf.Positional]
    """What a section wrote with --json."""
    plot: str = ""
    """Draw the contenders' ratios, or what grows with B, into this PNG or SVG."""


def report(options: Report) -> None:
    """Do it."""
    result = json.loads(Path(options.result).read_text("utf-8"))
    print(markdown(result))
    if options.plot:
        draw(result, options.plot)


def markdown(result: Mapping[str, Any]) -> str:
    """What was measured where, then each list of rows as a table."""
    machine = ", ".join(f"{value}" for value in result.get("machine", {}).values())
    parts = [f"commit {result.get('commit', 'unknown')}; {machine}"]
    parts += [table(rows) for rows in result.values() if _is_table(rows)]
    parts += [f"{name}: {_text(value)}" for name, value in result.items() if name.endswith("_exponent")]
    return "\n\n".join(parts)


def table(rows: Rows) -> str:
    """A Markdown table of the rows' numbers and names; a figure's range stands behind it."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    lines = ["| " + " | ".join(key.replace("_", " ") for key in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(key, "") for key in columns) + " |" for row in flat]
    return "\n".join(lines)


def _flat(row: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in row.items():
        if key == "range" or key.endswith("_range"):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key} {inner}": text for inner, text in _flat(value).items()}
        elif isinstance(value, (int, float, str)):
            between = row.get(f"{key}_range")
            varied = between and between[0] < between[1]
            flat[key] = f"{_text(value)} ({_text(between[0])} to {_text(between[1])})" if varied else _text(value)
    return flat


def _text(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def draw(result: Mapping[str, Any], path: str) -> None:
    """Bars of the contenders' ratios to their peers, or lines over B where there are sizes."""
    rows = result.get("rows", [])
    if all("batch_size" in row for row in rows) and rows:
        _draw_scaling(rows, path)
        return
    ratios = [key for row in rows for key in row if key.endswith("ratio") and _is_number(row[key])]
    ratios = list(dict.fromkeys(ratios))
    if not ratios:
        raise SystemExit(f"{path}: this result compares nothing, so there is nothing to draw. Leave out --plot.")
    figure, axes = _figure(len(ratios), len(rows))
    for axis, ratio in zip(axes, ratios, strict=True):
        shown = [row for row in rows if _is_number(row.get(ratio)) and not math.isnan(row[ratio])]
        spread = [row.get(f"{ratio}_range", (row[ratio], row[ratio])) for row in shown]
        below = [row[ratio] - low for row, (low, _) in zip(shown, spread, strict=True)]
        above = [high - row[ratio] for row, (_, high) in zip(shown, spread, strict=True)]
        errors = [below, above]
        axis.barh(
            [row["contender"] for row in shown],
            [row[ratio] for row in shown],
            xerr=errors,
            color="#4477aa",
            ecolor="#333333",
        )
        axis.axvline(1, color="#aa3377", linewidth=1)
        axis.invert_yaxis()
        axis.set_xlabel(f"{ratio.replace('_', ' ')} (1 is the peer)")
    _save(figure, path)


def _draw_scaling(rows: Rows, path: str) -> None:
    figure, axes = _figure(2, 6)
    sizes = [row["batch_size"] for row in rows]
    for axis, (key, label, power) in zip(
        axes, (("cpu_seconds", "CPU seconds", 2), ("added_mib", "added MiB", 1)), strict=True
    ):
        values = [row[key] for row in rows]
        axis.loglog(sizes, values, "o-", color="#4477aa", base=2)
        axis.loglog(sizes, [values[-1] * (size / sizes[-1]) ** power for size in sizes], "--", color="#aa3377", base=2)
        axis.set_xlabel(f"B (dashed: B^{power})")
        axis.set_ylabel(label)
    _save(figure, path)


def _figure(columns: int, lines: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5.5 * columns, 1.2 + 0.4 * lines), squeeze=False)
    return figure, axes[0]


def _save(figure: Any, path: str) -> None:
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
