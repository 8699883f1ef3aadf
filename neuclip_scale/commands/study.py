"""`neuclip study normalizer`: controlled experiments with a report."""

from __future__ import annotations

import sys

import tyro
from rich.console import Console

from neuclip_scale.files import write_json
from neuclip_scale.studies.normalizer.settings import NormalizerStudy

USAGE = """usage: neuclip study normalizer --output DIR [options]

normalizer  hold every estimate of the log-normalizer against the exact value along one training trajectory
`neuclip study NAME --help` lists the options.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the study is complete, 2 for bad usage."""
    if argv[:1] != ["normalizer"]:
        asked = argv[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    study = tyro.cli(NormalizerStudy, args=argv[1:], prog="neuclip study normalizer")
    return _normalizer(study)


def _normalizer(study: NormalizerStudy) -> int:
    from neuclip_scale.studies.normalizer.report import terminal_tables, write_report
    from neuclip_scale.studies.normalizer.running import run_study
    from neuclip_scale.studies.normalizer.summary import findings, late, summarise

    console = Console(highlight=False)
    result = run_study(study, lambda text: console.print(text, markup=False))
    write_json(study.output / "result.json", result)
    if study.json:
        write_json(study.json, result)
    for table in terminal_tables(result):
        console.print(table)
    for sentence in findings(summarise(late(result["rows"]))):
        console.print(sentence, markup=False)
    for path in [*write_report(result, study.output), study.output / "result.json"]:
        console.print(f"  {path}", markup=False)
    return 0
