"""Scores as tables: one run's, or several runs' side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from neuclip_scale.evaluation.measures import Scores, measures, set_sizes


def score_table(evaluations: Mapping[str, Mapping[str, Scores]]) -> Table:
    """Evaluations on the same sets by column name, beside chance and majority; three fit a terminal of 80 columns."""
    sizes = set_sizes(next(iter(evaluations.values())))
    table = Table(
        title="Evaluation",
        title_justify="left",
        caption=sizes,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("")
    for heading in (*evaluations, "chance", "majority"):
        table.add_column(heading, justify="right")
    columns = [list(measures(evaluation)) for evaluation in evaluations.values()]
    for row in zip(*columns, strict=True):
        first = row[0]
        values = [*(measure.value for measure in row), first.chance, first.majority]
        cells = ("" if v is None else f"{100 * v:.2f} %" for v in values)
        table.add_row(f"{first.set_name} {first.label}", *cells)
    return table


def print_scores(evaluation: Mapping[str, Scores], caveat: str = "", console: Console | None = None) -> None:
    """Print one evaluation as a table, then what could not be read, then `caveat`."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    console.print(score_table({"score": evaluation}))
    for name, scores in evaluation.items():
        if scores["num_unreadable"]:
            console.print(f"{name}: {scores['num_unreadable']} sample(s) could not be used, first:")
            for reason in scores["unreadable"][:5]:
                console.print(f"  {reason}")
    if caveat:
        console.print(caveat)


def demo_caveat(data: Path) -> str:
    """The sentence that scores on the demo's pictures must carry; empty for other data."""
    for folder in (data.resolve(), *data.resolve().parents[:2]):
        if (folder / "demo.json").is_file():
            try:
                return str(json.loads((folder / "demo.json").read_bytes()).get("caveat", ""))
            except ValueError:
                return ""
    return ""
