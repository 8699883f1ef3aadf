"""`neuclip study normalizer | methods`: controlled experiments with a report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import tyro
from rich.console import Console

from neuclip_scale.files import write_json
from neuclip_scale.studies.methods.settings import MethodsStudy
from neuclip_scale.studies.normalizer.settings import NormalizerStudy

USAGE = """usage: neuclip study normalizer | methods --output DIR [options]

normalizer  hold every estimate of the log-normalizer against the exact value along one training trajectory
methods     train objectives on the same data, budget and seeds, and compare them with intervals and costs
`neuclip study NAME --help` lists the options. A study that was killed goes on where it stopped.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the study is complete, 1 when a run of it failed, 2 for bad usage."""
    if argv[:1] == ["normalizer"]:
        return _normalizer(tyro.cli(NormalizerStudy, args=argv[1:], prog="neuclip study normalizer"))
    if argv[:1] == ["methods"]:
        return _methods(tyro.cli(MethodsStudy, args=argv[1:], prog="neuclip study methods"))
    asked = argv[:1] in (["-h"], ["--help"])
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _normalizer(study: NormalizerStudy) -> int:
    from neuclip_scale.studies.normalizer.report import terminal_tables, write_report
    from neuclip_scale.studies.normalizer.running import run_study
    from neuclip_scale.studies.normalizer.summary import findings, late, summarise

    console = Console(highlight=False, markup=False, emoji=False)
    result = run_study(study, lambda text: console.print(text))
    write_json(study.output / "result.json", result)
    if study.json:
        write_json(study.json, result)
    for table in terminal_tables(result):
        console.print(table)
    for sentence in findings(summarise(late(result["rows"]))):
        console.print(sentence)
    for path in [*write_report(result, study.output), study.output / "result.json"]:
        console.print(f"  {path}")
    return 0


def _methods(study: MethodsStudy) -> int:
    from neuclip_scale.commands.compare import print_comparison, write_comparison
    from neuclip_scale.comparison import compare_runs, read_runs
    from neuclip_scale.studies.methods.plan import meant_to_differ
    from neuclip_scale.studies.methods.running import StudyError, run_study, saved_plan
    from neuclip_scale.studies.methods.wall_clock import WallClock

    console = Console(highlight=False, markup=False, emoji=False)
    failure = None
    try:
        complete = run_study(study, lambda text: console.print(text))
    except StudyError as error:
        failure, complete = error, error.complete
    complete = {budget: folders for budget, folders in complete.items() if folders}
    if failure and not complete:
        raise failure
    documents: dict[str, object] = {}
    pages = []
    wall_clock = None
    for budget, folders in complete.items():
        comparison = compare_runs(read_runs(folders), meant_to_differ(study))
        if budget == "seconds":
            wall_clock = WallClock.of(saved_plan(study.output), folders)
            comparison = wall_clock.said_in(comparison)
        console.print(f"\nat equal {budget}:")
        print_comparison(comparison, console)
        pages += write_comparison(comparison, study.output / f"equal-{budget}", None)
        documents[budget] = comparison.document()
    times = {} if wall_clock is None else {"wall_clock": wall_clock.document()}
    _write(study, {"budgets": documents, **times, "failures": str(failure or "")})
    for path in pages:
        console.print(f"  {path}")
    if failure:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _write(study: MethodsStudy, found: Mapping[str, object]) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(study).items()}
    result = {"settings": settings, **found}
    write_json(study.output / "result.json", result)
    if study.json:
        write_json(study.json, result)
