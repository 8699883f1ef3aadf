"""`neuclip reshard -i POOL -o OUT [-s UIDS]`: new shards of chosen samples."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from neuclip_scale.files import write_json
from neuclip_scale.reshard import ImageWork, ReshardOptions, UsageError
from neuclip_scale.reshard.errors import told_to_user
from neuclip_scale.reshard.workers import available_cores, worker_pool

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from neuclip_scale.reshard.finishing import Totals
    from neuclip_scale.reshard.state import SavedPlan

_SECONDS_BETWEEN_LINES = 10
_BYTES_PER_SECOND = 4e8
"""Of a core, copying and verifying: for the estimate of --dry-run only."""


@dataclass(frozen=True, kw_only=True)
class ReshardArguments:
    """Write chosen samples of a pool of shards into new, even shards.

    An interrupted reshard goes on with the same command. Nothing is deleted or overwritten that it did not write.
    """

    input_dir: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """Folder with the input shards, *.tar as img2dataset and DataComp write them."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write: new, empty, or of this same reshard."""
    subset_file: Annotated[Path | None, tyro.conf.arg(aliases=["-s"])] = None
    """Uids to keep: DataComp's .npy of dtype u8,u8 (repeats are written again), a parquet with a column uid, or a
    text with one a line. Without it everything is kept."""
    where: str = ""
    """Instead of uids, a condition on columns of the parquets beside the shards: "score > 0.3 and width >= 200"."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 0
    """Processes; 0 takes every core."""
    shard_size: int = 0
    """Samples of an output shard at most; 0 means 10,000 unless --shard-bytes is given."""
    shard_bytes: int = 0
    """Bytes of an output shard at most, instead of samples (before pictures are encoded anew)."""
    shuffle: bool = False
    """Shuffle all samples over all output shards; else they keep the pool's order."""
    seed: int = 0
    """Of the shuffle."""
    resize: int = 0
    """Make pictures smaller, to this shorter side in pixels."""
    encode: str = ""
    """Encode pictures anew: jpg, webp or png, with a quality as webp:90."""
    blur_faces: bool = False
    """Blur the boxes of `face_bboxes` in each sample's json."""
    allow_missing: bool = False
    """Exit with 0 even if requested samples were not written."""
    verify: bool = False
    """At the end read every output and source from the disk again; also for a reshard that is complete."""
    dry_run: bool = False
    """Print counts, bytes and an estimate of the time; write nothing."""
    plan_only: bool = False
    """Write the plan and stop: the first step of a Slurm array."""
    part: str = ""
    """I/N: copy the I-th of N parts of the plan (from 1/N to N/N), on this machine; then run --finish once."""
    finish: bool = False
    """Check that all parts are complete, and write totals, sizes.json and manifest.json."""
    json: Path | None = None
    """Also write the result to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 when requested samples were not written, 2 for bad usage; raises `ReshardError`."""
    arguments = tyro.cli(ReshardArguments, args=argv, prog="neuclip reshard")
    try:
        options, part = _options(arguments), _part(arguments.part)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with worker_pool(1 if arguments.finish and not arguments.verify else options.num_workers) as pool:
        return _run(arguments, options, part, pool, began)


def _options(arguments: ReshardArguments) -> ReshardOptions:
    options = ReshardOptions(
        input_dir=arguments.input_dir,
        output_dir=arguments.output_dir,
        subset_file=arguments.subset_file,
        where=arguments.where,
        shard_size=arguments.shard_size,
        shard_bytes=arguments.shard_bytes,
        shuffle_seed=arguments.seed if arguments.shuffle else None,
        images=ImageWork(arguments.resize, arguments.encode, arguments.blur_faces),
        num_workers=arguments.num_workers or available_cores(),
    )
    options.check()
    return options


def _run(
    arguments: ReshardArguments,
    options: ReshardOptions,
    part_of: tuple[int, int],
    pool: ProcessPoolExecutor | None,
    began: float,
) -> int:
    from neuclip_scale.reshard.copying import CopyJob
    from neuclip_scale.reshard.finishing import finish
    from neuclip_scale.reshard.planning import dry_plan, prepare
    from neuclip_scale.reshard.running import copy_outputs, verify_outputs

    part, parts = part_of
    progress = ProgressLines()
    if arguments.dry_run:
        return _tell_dry_run(arguments, options, *dry_plan(options, pool, progress), time.perf_counter() - began)
    with told_to_user("planning"):
        saved = prepare(options, pool, progress)
    planned = time.perf_counter() - began
    print(f"plan {saved.digest}: {len(saved.plan.rows):,} samples into {saved.plan.num_outputs:,} shards")
    if arguments.plan_only:
        return _end(arguments, {"plan": saved.digest, "counts": asdict(saved.counts)}, 0)
    job = CopyJob(options.output_dir, options.input_dir, options.images, f"{part}of{parts}")
    numbers = range(part - 1, saved.plan.num_outputs, parts)
    if not arguments.finish:
        shards = copy_outputs(saved, job, numbers, pool, options.num_workers, progress)
        if arguments.part:
            if arguments.verify:
                verify_outputs(saved, job, numbers, pool, options.num_workers, progress)
            written = sum(shard.samples for shard in shards)
            print(f"part {arguments.part}: {written:,} samples in {len(shards):,} shards are complete")
            return _end(arguments, {"plan": saved.digest, "part": arguments.part, "written": written}, 0)
    totals = finish(saved, options.input_dir)
    if arguments.verify:
        verify_outputs(saved, job, range(saved.plan.num_outputs), pool, options.num_workers, progress)
    return _tell_totals(arguments, saved, totals, planned, time.perf_counter() - began)


def _part(text: str) -> tuple[int, int]:
    """I and N of "I/N"; 1 and 1 of an empty text."""
    part, _, parts = (text or "1/1").partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--part {text!r}: give I/N with I from 1 to N, as 3/16.")
    return int(part), int(parts)


class ProgressLines:
    """Prints how far the work is, every ten seconds, to stderr."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()

    def __call__(self, what: str, done: int, whole: int, amount: int) -> None:
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = amount / (now - self._began)
        unit = f"{rate:,.0f} samples/s" if what == "reading headers" else f"{rate / 1e6:,.0f} MB/s"
        print(f"{what}: {done:,} of {whole:,} shards, {unit}", file=sys.stderr, flush=True)


def _tell_dry_run(arguments: ReshardArguments, options: ReshardOptions, match: Any, plan: Any, seconds: float) -> int:
    estimate = seconds + plan.num_bytes / (_BYTES_PER_SECOND * options.num_workers)
    result = {
        "counts": asdict(match.counts),
        "corrupt_shards": sum(not item.key for item in match.corrupt),
        "output_shards": plan.num_outputs,
        "output_bytes": plan.num_bytes,
        "seconds_of_planning": seconds,
        "seconds_estimated": estimate,
    }
    _print_table("dry run: nothing was written", {**result.pop("counts"), **result})
    print(
        f"The estimate is for {options.num_workers} core(s) at {_BYTES_PER_SECOND / 1e6:.0f} MB/s each; "
        "a disk may be slower."
    )
    return _end(arguments, {"counts": asdict(match.counts), **result}, _status(arguments, match.counts.missing))


def _tell_totals(arguments: ReshardArguments, saved: SavedPlan, totals: Totals, planned: float, seconds: float) -> int:
    _print_table(f"reshard of {arguments.input_dir} into {arguments.output_dir}", asdict(totals))
    for name, fault in list(saved.sidecar_faults.items())[:3]:
        print(f"note: the parquet of {name} is not believed: {fault}", file=sys.stderr)
    lost = totals.missing + totals.dropped
    result = {
        "totals": asdict(totals),
        "plan": saved.digest,
        "parquets_not_believed": saved.sidecar_faults,
        "seconds": seconds,
        "seconds_of_planning": planned,
        "verified": arguments.verify,
    }
    return _end(arguments, result, _status(arguments, lost))


def _status(arguments: ReshardArguments, lost: int) -> int:
    if lost:
        listed = "" if arguments.dry_run else ": see missing_uids.txt and corrupt.jsonl"
        print(
            f"{lost:,} requested sample(s) are not in the output{listed}. --allow-missing makes that no failure.",
            file=sys.stderr,
        )
    return 1 if lost and not arguments.allow_missing else 0


def _end(arguments: ReshardArguments, result: dict[str, Any], status: int) -> int:
    if arguments.json:
        write_json(arguments.json, {**result, "status": status})
    return status


def _print_table(title: str, values: dict[str, Any]) -> None:
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in values.items():
        table.add_row(key.replace("_", " "), f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")
    Console(highlight=False, markup=False, emoji=False).print(table)
