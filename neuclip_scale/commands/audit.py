"""`neuclip audit --manifest LIST --download DIR --output DIR`: which data is this really?"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuclip_scale.audit.empirical_arms import EmpiricalError
from neuclip_scale.audit.errors import AuditError, UsageError
from neuclip_scale.audit.mattering import Assumptions, Claim
from neuclip_scale.audit.request import AuditRequest, EmpiricalOptions, Thresholds
from neuclip_scale.commands.progress import ProgressLines
from neuclip_scale.files import write_json, write_text
from neuclip_scale.queries.engines import Engine, EngineOptions
from neuclip_scale.queries.errors import QueryError
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.workers import available_cores, worker_pool
from neuclip_scale.untrusted_text import printable

if TYPE_CHECKING:
    from neuclip_scale.audit.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class AuditArguments:
    """Say what a download lacks of the published list, why, how that part differs, and whether it matters.

    Writes audit.json, audit.html and the uids of each class into the output folder. An interrupted audit goes on with
    the same command. Exit status: 0 no discrepancy above the limits, 1 some, 2 the audit could not be made.
    """

    manifest: str
    """The published list: parquet (file, folder or pattern) with uid or url, or a .tsv as CC3M's and CC12M's."""
    download: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]DIR"), tyro.conf.UseAppendAction]
    """What img2dataset or `neuclip reshard` wrote: a folder, or a manifest. Twice or more to compare downloads."""
    output: Path
    """Folder to write."""
    run: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Run folder of a training on one of the downloads: what it really saw."""
    subset_file: Annotated[Path | None, tyro.conf.arg(aliases=["-s"])] = None
    """Uids that are wanted, all without it: DataComp's .npy of dtype u8,u8, a parquet with a column uid, or a text."""
    identity: Literal["auto", "uid", "url"] = "auto"
    """What makes two records one sample; auto takes the uid, and the url where something has no uids."""
    deep: bool = False
    """Decode every picture, and compare what the same sample looks like in the downloads."""
    samples_seen: int | None = None
    """Samples that a training sees, for the passes over each download."""
    gain: float | None = None
    """Claimed gain in points of a run on the first download over one on the second."""
    first_scores: tuple[float, ...] = ()
    """Instead, scores in points of runs on the first download, one a seed."""
    second_scores: tuple[float, ...] = ()
    """Those on the second."""
    metric: Literal["average", "imagenet"] = "average"
    """What the scores are: DataComp's average over 38 tasks, or ImageNet's top-1."""
    assume: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=POINTS"), tyro.conf.UseAppendAction] = ()
    """Instead of the published figure: seed_deviation, points_per_doubling, points_per_share, repeat_decay."""
    empirical: bool = False
    """Train at small scale on what each download holds, on what both do and on random drops of the same sizes."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 0
    """Processes that read shards; 0 takes every core."""
    json: Path | None = None
    """Also write audit.json to this file."""
    thresholds: Annotated[Thresholds, tyro.conf.arg(name="")] = field(default_factory=Thresholds)
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)
    empirical_options: Annotated[EmpiricalOptions, tyro.conf.arg(name="empirical")] = field(
        default_factory=EmpiricalOptions
    )


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 when a discrepancy was found, 2 when the audit could not be made."""
    arguments = tyro.cli(AuditArguments, args=argv, prog="neuclip audit")
    try:
        return _run(arguments, _request(arguments))
    except (AuditError, EmpiricalError, QueryError, ReshardError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or arguments.output}: {error.strerror or error}. Mend that.", file=sys.stderr)
    return 2


def _request(arguments: AuditArguments) -> AuditRequest:
    request = AuditRequest(
        manifest=arguments.manifest,
        downloads=arguments.download,
        output=arguments.output,
        runs=arguments.run,
        subset_file=arguments.subset_file,
        identity=arguments.identity,
        deep=arguments.deep,
        samples_seen=arguments.samples_seen,
        thresholds=arguments.thresholds,
        claim=_claim(arguments),
        empirical=arguments.empirical_options if arguments.empirical else None,
        engine=arguments.engine,
        num_workers=arguments.num_workers or available_cores(),
    )
    request.check()
    return request


def _claim(arguments: AuditArguments) -> Claim:
    assumed = {}
    for setting in arguments.assume:
        name, _, value = setting.partition("=")
        try:
            assumed[name] = float(value)
            Assumptions(**assumed)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--assume {setting!r}: {error}. Give NAME=POINTS, see --help.") from error
    scores = arguments.first_scores, arguments.second_scores
    return Claim(arguments.gain, arguments.metric, *scores, Assumptions(**assumed))


def _run(arguments: AuditArguments, request: AuditRequest) -> int:
    from neuclip_scale.audit.inputs import open_inputs

    inputs = open_inputs(request, request.output / "cache")
    progress = ProgressLines("shards")
    with Engine(request.engine, request.output / "cache") as engine:
        from neuclip_scale.audit.auditing import Audit
        from neuclip_scale.audit.document import add_digest, build_document
        from neuclip_scale.audit.lists import remove_lists, write_list
        from neuclip_scale.audit.page import render_page

        with worker_pool(request.num_workers) as pool:
            audit = Audit(request, inputs, engine, pool, progress)
        document = build_document(audit)
        with audit.stage("writing lists"):
            folder = request.output / "lists"
            remove_lists(request.output)
            document["lists"] = {
                name: write_list(engine, query, folder / name) for name, query in audit.lists().items()
            }
    if request.empirical:
        document["empirical"] = _train(request, inputs, request.empirical)
    add_digest(document)
    for path in (request.output / "audit.json", *([arguments.json] if arguments.json else [])):
        write_json(path, document)
    write_text(request.output / "audit.html", render_page(document))
    _print(document, Console(highlight=False, markup=False, emoji=False))
    return int(document["status"])


def _train(request: AuditRequest, inputs: Inputs, options: EmpiricalOptions) -> dict[str, Any]:
    """Train on the first two downloads; what the document holds of it."""
    from neuclip_scale.audit.empirical import EmpiricalCheck, join_pools, run_check

    if inputs.identity == "url":
        raise UsageError("--empirical: samples are known by their urls here, and it needs uids.")
    first, second = inputs.downloads[:2]
    folder, lists = request.output / "empirical", request.output / "lists"
    check = EmpiricalCheck(
        output=folder,
        pool=join_pools([first, second], folder / "pool"),
        first=lists / "usable.npy",
        second=lists / second.name / "usable.npy",
        options=options,
        num_workers=request.num_workers,
    )
    return run_check(check, lambda text: print(text, file=sys.stderr, flush=True)).document()


def _print(document: dict[str, Any], console: Console) -> None:
    table = Table(title="uids", title_justify="left")
    table.add_column("")
    for part in document["downloads"]:
        table.add_column(Text(printable(part["name"])), justify="right")
    for name in document["counts"]:
        values = [part["counts"][name] for part in document["downloads"]]
        table.add_row(name.replace("_", " "), *("unknown" if value is None else f"{value:,}" for value in values))
    console.print(table)
    for part in document["downloads"]:
        for name, reason in part["reasons"].items():
            line = f"{part['name']}: {reason['count']:,} {name} - {reason['words']}"
            console.print(Text(printable(line)))
    for note in document["notes"]:
        console.print(Text(f"note: {printable(note)}"))
    for finding in document["findings"]:
        text = printable(f"{finding['subject']}: {finding['text']}")
        console.print(
            Text(
                f"! {text}" if finding["is_discrepancy"] else f"  {text}",
                style="red" if finding["is_discrepancy"] else "",
            )
        )
    for part in filter(None, (document["effect"], document["empirical"])):
        console.print(Text(printable(part["sentence"] if "arms" in part else part["sentences"][0])))
    verdict = "Discrepancies were found." if document["status"] else "No discrepancy above the limits."
    console.print(f"{verdict} Digest {document['digest']}.")
