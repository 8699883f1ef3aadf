"""`neuclip evaluate RUN_OR_MODEL --suite datacomp --data FOLDER`"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from neuclip_scale.evaluation.encoders import Encoders


def run_datacomp(
    encoders: Encoders, data: Path, output: Path, tasks: Sequence[str], *, hub: bool, any_size: bool
) -> dict[str, Any]:
    """Evaluate, and print on rank 0 (collective); raises `SuiteError` for a task that does not exist."""
    from neuclip_scale import distributed
    from neuclip_scale.evaluation.datacomp.suite import SuiteRequest, run_suite
    from neuclip_scale.evaluation.datacomp.tasks import select_tasks

    summary = run_suite(
        encoders,
        SuiteRequest(data, output, select_tasks(tasks), hub=hub, any_size=any_size),
        report=lambda line: print(line, flush=True),
    )
    if distributed.is_main():
        print_summary(summary, output)
    return summary


def is_whole(summary: Mapping[str, Any]) -> bool:
    """Whether every task that was asked for was evaluated."""
    return not summary["missing"] and not summary["failed"]


def print_summary(summary: Mapping[str, Any], output: Path, console: Console | None = None) -> None:
    """Print scores, averages, and all that the averages lack."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    table = Table(title="DataComp", title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("")
    table.add_column("metric")
    table.add_column("score", justify="right")
    table.add_column("samples", justify="right")
    for row in summary["tasks"]:
        table.add_row(row["dataset"], row["metric"], _percent(row["value"]), f"{row['num_samples']:,}")
    table.add_section()
    for name, average in summary["averages"].items():
        table.add_row(name, "mean", _percent(average["value"]), "")
        if average["value"] is None and average["num_present"]:
            part = f"{average['num_present']} of {average['num_tasks']} tasks"
            table.add_row(f"  only of {part}", "mean", _percent(average["mean_of_those_present"]), "")
    console.print(table)
    for name, reason in (("missing", "folder"), ("failed", "error"), ("incomplete", "reason")):
        if summary[name]:
            print_list(console, f"{name}, and in no average:", [f"{x['key']}: {x[reason]}" for x in summary[name]])
    console.print(f"results: {output}/eval_results.jsonl, summary.json", soft_wrap=True)


def print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    """Print a title with indented lines, never folded: they hold paths."""
    console.print(title)
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
