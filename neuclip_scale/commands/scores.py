"""Scores as tables: one run's, or several runs' side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Scores = Mapping[str, Any]


class Measure(NamedTuple):
    """One score of a set beside what guessing gives; fractions."""

    set_name: str
    label: str
    value: float
    chance: float
    majority: float | None


def measures(evaluation: Mapping[str, Scores]) -> Iterator[Measure]:
    """The scores of what `evaluate_folder` returned, in a fixed order."""
    for name, scores in evaluation.items():
        if scores["task"] == "zeroshot":
            size = f"{scores['num_pictures']:,} pictures, {scores['num_classes']:,} classes"
            yield Measure(name, f"top-1 ({size})", scores["top1"], scores["chance_top1"], scores["majority"])
            yield Measure(name, "top-5", scores["top5"], scores["chance_top5"], None)
            recall = scores["mean_per_class_recall"]
            yield Measure(name, "mean per-class recall", recall, scores["chance_top1"], None)
            continue
        sizes = {
            "image_to_text": f"{scores['num_texts']:,} texts",
            "text_to_image": f"{scores['num_pictures']:,} pictures",
        }
        for direction, size in sizes.items():
            for measure, value in scores[direction].items():
                label = f"{direction.replace('_', ' ')} {measure.replace('recall', 'R')} ({size})"
                yield Measure(name, label, value, scores[f"chance_{direction}"][measure], None)


def score_table(evaluations: Mapping[str, Mapping[str, Scores]]) -> Table:
    """Evaluations on the same sets by column name, beside chance and majority."""
    table = Table(title="Evaluation", title_justify="left")
    for heading in ("set", "measure"):
        table.add_column(heading)
    for heading in (*evaluations, "chance", "majority"):
        table.add_column(heading, justify="right")
    columns = [list(measures(evaluation)) for evaluation in evaluations.values()]
    for row in zip(*columns, strict=True):
        first = row[0]
        values = [*(measure.value for measure in row), first.chance, first.majority]
        table.add_row(first.set_name, first.label, *("" if v is None else f"{100 * v:.2f} %" for v in values))
    return table


def print_scores(evaluation: Mapping[str, Scores], caveat: str = "", console: Console | None = None) -> None:
    """Print one evaluation as a table, then what could not be read, then `caveat`."""
    console = console or Console(highlight=False)
    console.print(score_table({"score": evaluation}))
    for name, scores in evaluation.items():
        if scores["num_unreadable"]:
            console.print(f"{name}: {scores['num_unreadable']} sample(s) could not be used, first:", markup=False)
            for reason in scores["unreadable"][:5]:
                console.print(f"  {reason}", markup=False)
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
