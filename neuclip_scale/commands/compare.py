"""`neuclip compare RUN...`: whether runs can be compared, and how they compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuclip_scale.comparison import Comparison, compare_runs, read_runs
from neuclip_scale.comparison.sections import Grid, conclusion, sections, summary_lines
from neuclip_scale.files import write_json, write_text
from neuclip_scale.untrusted_text import printable

MOST_COLUMNS = 12
"""Of a table in the terminal; a column for each of many runs would be a character wide."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Say whether runs can be compared (recipes, code, data), and compare them: scores over seeds, curves, cost."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, finished or stopped; runs that differ in the seed alone are seeds of one arm."""
    output: Path = Path("runs/compare")
    """Folder for index.html and compare.json."""
    json: Path | None = None
    """Also write what compare.json holds to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the runs are comparable, 1 when something stands against it or a file of a run
    cannot be read, 2 for bad usage."""
    arguments = tyro.cli(CompareArguments, args=argv, prog="neuclip compare")
    problem = _usage_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    comparison = compare_runs(read_runs(arguments.runs))
    try:  # before anything is printed: `| head` ends the process
        written = write_comparison(comparison, arguments.output, arguments.json)
    except OSError as error:
        where = printable(str(error.filename))
        print(f"error: {where}: {error.strerror}. Give --output and --json places to write to.", file=sys.stderr)
        return 1
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a file has no width, and eighty columns would fold every table
        console = Console(highlight=False, markup=False, emoji=False, width=max(console.width, 150))
    print_comparison(comparison, console)
    console.print()
    for path in written:
        console.print(f"  {printable(str(path))}", soft_wrap=True)
    return 0 if comparison.comparable else 1


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The verdict, what stands against comparing the runs, then all tables. Nothing in them is taken for markup."""
    verdict, findings = summary_lines(comparison)
    style = "bold green" if comparison.is_sure else "bold red" if comparison.drift.other else "bold"
    console.print(Text(verdict, style=style))
    for text in findings:
        console.print(Text(f"! {text}", style="red"))
    if follows := conclusion(comparison):
        console.print(follows)
    for section in sections(comparison):
        console.print()
        console.print(Text(section.title, style="bold underline"))
        for line in section.lines:
            console.print(Text(line))
        for grid in section.grids:
            if len(grid.columns) > MOST_COLUMNS:
                console.print(Text(f"{grid.title or section.title}: {len(grid.columns)} columns, see index.html."))
            else:
                console.print(table(grid))


def table(grid: Grid) -> Table:
    """`grid` for the console."""
    shown = Table(title=Text(grid.title, style="italic") if grid.title else None, title_justify="left")
    for column in grid.columns:
        shown.add_column(Text(column), overflow="fold")
    for row in grid.rows:
        shown.add_row(*map(Text, row))
    return shown


def write_comparison(comparison: Comparison, output: Path, json_path: Path | None) -> list[Path]:
    """Write compare.json and index.html into `output`, and the JSON to `json_path` too; raises OSError."""
    from neuclip_scale.comparison.figures import draw_curves
    from neuclip_scale.comparison.page import render_page

    document = comparison.document()
    written = [output / "compare.json", *([json_path] if json_path else [])]
    for path in written:
        write_json(path, document)
    write_text(output / "index.html", render_page(comparison, draw_curves(comparison.curves)))
    return [*written, output / "index.html"]


def _usage_problem(arguments: CompareArguments) -> str:
    if len(arguments.runs) < 2:
        return f"RUN: {len(arguments.runs)} given; a comparison takes at least two run folders."
    for run in arguments.runs:
        if not run.is_dir():
            return f"RUN {printable(str(run))}: there is no such folder. Give folders that `neuclip train` wrote."
    twice = _first_repeated([run.resolve() for run in arguments.runs])
    if twice:
        return f"RUN {printable(str(twice))}: given twice. Give each run once."
    if arguments.output.exists() and not arguments.output.is_dir():
        return f"--output {printable(str(arguments.output))}: not a folder. Give another one."
    return ""


def _first_repeated(paths: Sequence[Path]) -> Path | None:
    return next((path for place, path in enumerate(paths) if path in paths[:place]), None)
