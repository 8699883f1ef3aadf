"""A plot and Markdown tables of a benchmark's JSON: `python tools/bench.py report RESULT.json`.

A table is a list of rows, or rows by name, wherever in the result; all measurements, under `runs`, are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

Rows = Sequence[Mapping[str, Any]]
APART = ("options", "machine", "commit", "failures")
"""What is in the heading, stands apart or says what was asked for: no part of what was measured."""

SHARES = ("share_of_bound", "mfu")
REMEDY = "Give what a section wrote with --json."


@dataclass(frozen=True, kw_only=True)
class Report:
    """Print every table of a result as Markdown, and draw its figures."""

    result: Annotated[str, tyro.conf.Positional]
    """What a section wrote with --json."""
    plot: str = ""
    """Draw the contenders' ratios, where there are none their shares of the bound, or what grows with B, into this
    PNG or SVG.
    """


def report(options: Report) -> None:
    """Do it. Raises SystemExit for a file that cannot be read or holds no result."""
    try:
        result = json.loads(Path(options.result).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{options.result}: it cannot be read as JSON ({error}). {REMEDY}") from error
    if not isinstance(result, Mapping):
        raise SystemExit(f"{options.result}: it holds no result but a {type(result).__name__}. {REMEDY}")
    print(markdown(result))
    if options.plot:
        draw(result, options.plot)


def markdown(result: Mapping[str, Any]) -> str:
    """What was measured where, then its tables, single figures and failures."""
    heading = f"commit {result.get('commit', 'unknown')}; {_where(result)}"
    parts = [heading]
    for name, rows in tables(result):
        parts.append((f"**{name}**\n\n" if name else "") + table(rows))
    figures = [f"- {name}: {_text(value)}" for name, value in _figures(result)]
    failures = [f"- {name} failed: {why}" for name, why in (result.get("failures") or {}).items()]
    return "\n\n".join([*parts, *("\n".join(lines) for lines in (figures, failures) if lines)])


def _where(result: Mapping[str, Any]) -> str:
    """The device, and the machine that it was in."""
    machine, gpu = result.get("machine") or "", result.get("gpu")
    device = result.get("device") or (gpu.get("name") if isinstance(gpu, Mapping) else None)
    parts = machine.values() if isinstance(machine, Mapping) else (machine,)
    return ", ".join(str(part) for part in (device, *parts) if part)


def tables(result: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Rows]]:
    """Each table with its name, as `gpu kernels`; of rows that are called `rows`, with what they stand in."""
    for key, value in result.items():
        if key in APART or key == "runs" or key.endswith("_runs"):
            continue
        name = within if key == "rows" else f"{within} {key}".strip()
        if _is_table(value):
            yield name, value
        elif isinstance(value, Mapping) and value and _is_table(list(value.values())):
            yield name, [{"name": each, **row} for each, row in value.items()]
        elif isinstance(value, Mapping):
            yield from tables(value, name)


def _figures(result: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and text that stand in no table."""
    for key, value in result.items():
        if key in APART or key == "runs" or key.endswith("_runs") or (not within and key == "device"):
            continue
        name = f"{within} {key}".strip()
        if isinstance(value, (int, float, str)):
            yield name, value
        elif isinstance(value, Mapping) and not _is_table(list(value.values())):
            yield from _figures(value, name)


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
    """Bars of the contenders' ratios to their peers or shares of the bound, or lines over B where there are sizes."""
    rows = result.get("rows", [])
    if _is_table(rows) and all({"batch_size", "cpu_seconds", "added_mib"} <= row.keys() for row in rows):
        _draw_scaling(rows, path)
        return
    panels = [panel for name, rows in tables(result) for panel in _panels(name, rows)]
    if not panels:
        raise SystemExit(f"{path}: this result compares nothing, so there is nothing to draw. Leave out --plot.")
    figure, axes = _figure(len(panels), max(len(panel.rows) for panel in panels))
    for axis, (name, figure_of, shown) in zip(axes, panels, strict=True):
        spread = [row.get(f"{figure_of}_range", (row[figure_of], row[figure_of])) for row in shown]
        below = [row[figure_of] - low for row, (low, _) in zip(shown, spread, strict=True)]
        above = [high - row[figure_of] for row, (_, high) in zip(shown, spread, strict=True)]
        axis.barh(
            [_label(row) for row in shown],
            [row[figure_of] for row in shown],
            xerr=[below, above],
            color="#4477aa",
            ecolor="#333333",
        )
        axis.axvline(1, color="#aa3377", linewidth=1)
        axis.invert_yaxis()
        axis.set_xlabel(f"{figure_of.replace('_', ' ')} (1 is the {'bound' if figure_of in SHARES else 'peer'})")
        axis.set_title(name)
    _save(figure, path)


class _Panel(NamedTuple):
    """Bars of one figure of a table's rows."""

    name: str
    figure: str
    rows: Rows


def _panels(name: str, rows: Rows) -> list[_Panel]:
    ratios = dict.fromkeys(key for row in rows for key in row if key.endswith("ratio") and _is_number(row[key]))
    panels = []
    for figure in ratios or SHARES:
        shown = [row for row in rows if _is_number(row.get(figure)) and not math.isnan(row[figure])]
        panels += [_Panel(name, figure, shown)] if shown else []
    return panels


def _label(row: Mapping[str, Any]) -> str:
    first, value = next(iter(row.items()))
    return str(row.get("contender", row.get("name", f"{first.replace('_', ' ')} {_text(value)}")))


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
