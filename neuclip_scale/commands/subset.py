"""`neuclip subset --metadata-dir DIR --save-path OUT.npy --name basic_filter`: which samples of a pool to train on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuclip_scale.commands.progress import ProgressLines
from neuclip_scale.files import write_json
from neuclip_scale.queries.engines import EngineOptions
from neuclip_scale.queries.errors import QueryError
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.workers import available_cores
from neuclip_scale.subset.errors import SubsetError, UsageError
from neuclip_scale.subset.filters import (
    Arch,
    BasicFilter,
    CaptionFilter,
    ClipScoreFilter,
    EnglishFilter,
    Filter,
    FilterName,
    ImageFilter,
    TextFilter,
)
from neuclip_scale.subset.outcome import Subset
from neuclip_scale.subset.request import Columns, SubsetRequest
from neuclip_scale.subset.selecting import select_subset
from neuclip_scale.untrusted_text import printable

_LAION2B_THRESHOLD = 0.28
_WITH_ENGLISH = ("basic_filter", "laion2b", "text_based", "image_based", "image_based_intersect_clip_score")
_WITH_SCORE = ("clip_score", "image_based_intersect_clip_score")
_WITH_PICTURES = ("image_based", "image_based_intersect_clip_score")


@dataclass(frozen=True, kw_only=True)
class SubsetArguments:
    """Write the uids of a pool's samples that pass DataComp's filters, as `neuclip reshard -s` takes them.

    Options are called as in DataComp's baselines.py. An interrupted selection goes on with the same command. Exit
    status: 0 done, 1 something of the pool could not be read, 2 the selection could not be made.
    """

    metadata_dir: str
    """The pool's parquets: a folder, a pattern, or an address as s3://bucket/metadata; for image_based with their
    .npz beside them."""
    save_path: Path
    """The .npy to write; its report goes beside it, with .json added to the name."""
    name: Annotated[tuple[FilterName, ...], tyro.conf.UseAppendAction]
    """The filter; given more than once, samples must pass all of them."""
    arch: Arch | None = None
    """Of clip_score: whose scores, those of ViT-B/32 or ViT-L/14."""
    fraction: float | None = None
    """Of clip_score: keep this share of the pool, the highest scores."""
    threshold: float | None = None
    """Of clip_score: keep scores of at least this."""
    ties: Literal["uid", "all"] = "uid"
    """Of scores equal at the fraction's end keep the smallest uids, to the exact share; or as DataComp all of them."""
    english: Literal["auto", "yes", "no"] = "auto"
    """Ask the caption's language; auto does where DataComp does, in all filters but no_filter and clip_score."""
    language_model: Path | None = None
    """fasttext's lid.176.bin, which DataComp takes; without it the small lid.176.ftz of the extra `language`."""
    language_column: str = ""
    """Instead of a model, a column of the pool that says `en`."""
    min_words: int = BasicFilter.min_words
    """Of basic_filter: words of the caption."""
    min_chars: int = BasicFilter.min_chars
    """Of basic_filter: characters of the caption."""
    min_side: int = BasicFilter.min_side
    """Of basic_filter: pixels of the smaller side."""
    max_aspect: float = BasicFilter.max_aspect
    """Of basic_filter: longer over smaller side."""
    wordnet: Path | None = None
    """Of text_based: folder of WordNet 3.0, as /usr/share/wordnet."""
    synsets: Path | None = None
    """Of text_based: ids of WordNet to look for, one a line; without it ImageNet-21k's."""
    names: str | None = None
    """Of text_based, without WordNet: a file of names, one a line, or `imagenet21k`."""
    centroids: Path | None = None
    """Of image_based: centroids of the pool's clusters, [k, d] .npy."""
    target_embeddings: Path | None = None
    """Of image_based: embeddings of ImageNet's training pictures, [m, d] .npy."""
    clusters: Path | None = None
    """Of image_based, instead: numbers of the clusters to keep, .npy or one a line."""
    embedding_key: str = "l14_img"
    """Of image_based: the array in each .npz."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of image_based: where similarities are computed."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 0
    """Processes; 0 takes every core. On GPUs give their number."""
    json: Path | None = None
    """Also write the report to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 when something of the pool could not be read, 2 when nothing was selected."""
    arguments = tyro.cli(SubsetArguments, args=argv, prog="neuclip subset")
    try:
        subset = select_subset(_request(arguments), ProgressLines("slices"))
        if arguments.json:
            write_json(arguments.json, subset.document())
    except (SubsetError, QueryError, ReshardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or arguments.save_path}: {error.strerror or error}. Mend that.", file=sys.stderr)
        return 2
    _print(subset, Console(highlight=False, markup=False, emoji=False))
    return subset.status


def _request(arguments: SubsetArguments) -> SubsetRequest:
    return SubsetRequest(
        metadata=arguments.metadata_dir,
        output=arguments.save_path,
        filters=_filters(arguments),
        columns=arguments.columns,
        engine=arguments.engine,
        num_workers=arguments.num_workers or available_cores(),
    )


def _filters(arguments: SubsetArguments) -> tuple[Filter, ...]:
    """The conditions that the names stand for; raises `UsageError` for options without their filter."""
    names = arguments.name
    _check_options(arguments)
    found: list[Filter] = []
    if "basic_filter" in names:
        limits = arguments.min_words, arguments.min_chars, arguments.min_side, arguments.max_aspect
        found.append(BasicFilter(*limits))
    if any(name in _WITH_SCORE for name in names):
        if arguments.arch is None:
            raise UsageError("clip_score: give --arch l14 or --arch b32.")
        found.append(ClipScoreFilter(arguments.arch, arguments.fraction, arguments.threshold, arguments.ties))
    if "laion2b" in names:
        found.append(ClipScoreFilter("b32", threshold=_LAION2B_THRESHOLD))
    if "text_based" in names:
        found.append(TextFilter(arguments.wordnet, arguments.synsets, _names(arguments.names)))
    if any(name in _WITH_PICTURES for name in names):
        if arguments.centroids is None:
            raise UsageError("image_based: give --centroids, a [k, d] .npy. docs/subset.md says where they come from.")
        files = arguments.centroids, arguments.target_embeddings, arguments.clusters
        found += [CaptionFilter(), ImageFilter(*files, arguments.embedding_key, arguments.device)]
    is_asked = any(name in _WITH_ENGLISH for name in names) if arguments.english == "auto" else None
    if is_asked or arguments.english == "yes":
        found.append(EnglishFilter(arguments.language_model, arguments.language_column))
    return tuple(found)


def _names(names: str | None) -> Path | str | None:
    return names if names in (None, "imagenet21k") else Path(names)


def _check_options(arguments: SubsetArguments) -> None:
    """Raise `UsageError` for an option of a filter that was not asked for: it would have no effect."""
    options = {
        _WITH_SCORE: ("arch", "fraction", "threshold", "ties"),
        ("basic_filter",): ("min_words", "min_chars", "min_side", "max_aspect"),
        ("text_based",): ("wordnet", "synsets", "names"),
        _WITH_PICTURES: ("centroids", "target_embeddings", "clusters", "embedding_key", "device"),
    }
    for owners, fields in options.items():
        if not any(name in owners for name in arguments.name):
            for each in fields:
                if getattr(arguments, each) != getattr(SubsetArguments, each):
                    raise UsageError(f"--{each.replace('_', '-')}: belongs to --name {owners[0]}, which is not given.")
    if arguments.english == "no" and (arguments.language_model or arguments.language_column):
        raise UsageError("--english no: leave out --language-model and --language-column.")


def _print(subset: Subset, console: Console) -> None:
    table = Table(title=f"{subset.num_rows:,} rows", title_justify="left")
    for title in ("filter", "asked", "passed", "threshold"):
        table.add_column(title, justify="left" if title == "filter" else "right")
    for each in subset.filters:
        threshold = each.cut.threshold if each.cut else each.settings.get("threshold")
        cut = "" if threshold is None else f"{threshold:.6g}"
        table.add_row(each.name, f"{each.asked:,}", f"{each.passed:,}", cut)
    if subset.filters:
        console.print(table)
    for lost in subset.unreadable:
        rows = "" if lost.num_rows is None else f", {lost.num_rows:,} rows"
        console.print(Text(printable(f"! {lost.file}{rows}: {lost.fault}"), style="red"))
    for row in subset.unusable:
        console.print(Text(printable(f"! {row['file']} row {row['row']}: {row['reason']}"), style="red"))
    if subset.num_unusable > len(subset.unusable):
        console.print(f"! {subset.num_unusable:,} rows could not be used", style="red")
    repeated = f", {subset.num_repeated:,} rows repeat one of them" if subset.num_repeated else ""
    there = " (was complete already)" if subset.was_there else ""
    console.print(Text(printable(f"{subset.path}: {subset.num_uids:,} uids{repeated}{there}")))
    console.print(f"Filters {subset.filters_digest}, selection {subset.digest}.")
