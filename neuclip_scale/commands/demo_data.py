"""`neuclip demo-data OUT`"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from neuclip_scale.data.demo.build import DemoDataError, DemoOptions, DemoResult, build_demo
from neuclip_scale.data.demo.icons import IconError
from neuclip_scale.data.demo.npm import FetchError, default_cache
from neuclip_scale.data.demo.rasterise import MissingRendererError
from neuclip_scale.data.demo.write import write_json

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 512


@dataclass(frozen=True, kw_only=True)
class DemoDataArguments:
    """Fetch named pictures (colour icon sets from npm) and write training shards and two evaluation sets.

    OUT/train is img2dataset's layout, OUT/eval clip_benchmark's. It is clip art and says nothing about
    photographs.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; an unfinished one is continued, a finished one is left as it is."""
    image_size: int = 64
    """Edge of the pictures in pixels."""
    held_out_names: int = 500
    """Names that no training pair has; the retrieval set asks for them."""
    limit: int = 0
    """Keep only so many names, for a quick try; 0 keeps all."""
    cache: Path | None = None
    """Where npm puts the packages; $NEUCLIP_CACHE/demo or ~/.cache/neuclip-scale/demo."""
    offline: bool = False
    """Use what is in the cache and never the network."""
    workers: int = 0
    """Drawing processes; 0 uses the cores there are, at most four."""
    json: Path | None = None
    """Also write OUT/demo.json's content to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the folder is complete, 1 when it failed, 2 for bad usage."""
    arguments = tyro.cli(DemoDataArguments, args=argv, prog="neuclip demo-data", config=(tyro.conf.FlagCreatePairsOff,))
    problem = _usage_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    options = DemoOptions(
        out=arguments.out,
        cache=arguments.cache or default_cache(),
        image_size=arguments.image_size,
        num_held_out_names=arguments.held_out_names,
        num_concepts=arguments.limit,
        offline=arguments.offline,
        workers=arguments.workers,
    )
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        with _progress(console) as progress:
            result = build_demo(options, _reporter(progress, console))
    except (DemoDataError, FetchError, IconError, MissingRendererError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_result(console, arguments.out, result)
    if arguments.json:
        write_json(arguments.json, result.summary)
    return 0


def _usage_problem(arguments: DemoDataArguments) -> str:
    if not MIN_IMAGE_SIZE <= arguments.image_size <= MAX_IMAGE_SIZE:
        return f"--image-size {arguments.image_size}: give {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels."
    for name in ("held_out_names", "limit", "workers"):
        if getattr(arguments, name) < 0:
            return f"--{name.replace('_', '-')} {getattr(arguments, name)}: give zero or a positive number."
    return ""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _reporter(progress: Progress, console: Console) -> Callable[[str, int, int], None]:
    """Bars on a terminal, one plain line a stage in a log."""
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
            if not console.is_terminal:
                console.print(f"{stage} ({total:,})")
        progress.update(tasks[stage], completed=done)

    return report


def _print_result(console: Console, out: Path, result: DemoResult) -> None:
    summary = result.summary
    if result.was_there:
        console.print(f"{out} is complete already; nothing was done.")
    if result.num_shards_kept:
        console.print(f"{result.num_shards_kept} shard(s) of an interrupted run were kept.")
    console.print(
        f"{out}/train: {summary['num_train']:,} pairs, {summary['num_train_names']:,} captions, "
        f"{summary['image_size']} px"
    )
    console.print(
        f"{out}/eval/zeroshot: {summary['num_zero_shot']:,} pictures by {summary['held_out_vendor']} "
        f"(never trained on), {summary['num_zero_shot_classes']:,} names\n"
        f"{out}/eval/retrieval: {summary['num_retrieval']:,} pairs whose names are never trained on"
    )
    removed = summary["removed"]
    console.print(
        f"removed from training: {removed['equal_to_an_evaluation_picture']} equal and "
        f"{removed['nearly_equal_to_an_evaluation_picture']} nearly equal to an evaluation picture, "
        f"{removed['repeated_in_training']} repeated; {removed['malformed']} icons could not be drawn"
    )
    for name, reason in list(summary["malformed"].items())[:10]:
        console.print(f"  {name}: {reason}")
    console.print(f"{summary['caveat']} Licences: {out}/LICENSES.md")
