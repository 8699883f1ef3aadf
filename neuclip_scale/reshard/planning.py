"""From options to a plan: the pool's shards are scanned, or a plan that was saved is taken up."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from neuclip_scale.data.shards import ShardError, expand_shards
from neuclip_scale.reshard.errors import ReshardError, told_to_user
from neuclip_scale.reshard.matching import Match, match_pool
from neuclip_scale.reshard.options import ReshardOptions
from neuclip_scale.reshard.plan import Plan, make_plan
from neuclip_scale.reshard.predicate import parse_predicate
from neuclip_scale.reshard.request import Request, load_request
from neuclip_scale.reshard.scanning import ScannedShard, scan_shard
from neuclip_scale.reshard.state import FOLDER, SavedPlan, SourceFile, check_plan, load_plan, save_odd_index, save_plan
from neuclip_scale.reshard.uids import uid_text
from neuclip_scale.reshard.workers import ordered

Progress = Callable[[str, int, int, int], None]
"""Called with what is done, how many of how many, and bytes."""


@dataclass(frozen=True)
class Pool:
    """The input shards, sorted by path, as they are now."""

    folder: Path
    files: list[SourceFile]
    digest: str


def find_pool(folder: Path) -> Pool:
    """List `folder`/*.tar; the digest covers names, sizes and times of shards and of the parquets beside them."""
    if not folder.is_dir():
        raise ReshardError(f"--input-dir {folder}: is no folder. Give the folder that holds the .tar shards.")
    try:
        paths = expand_shards(str(folder))
    except ShardError as error:
        raise ReshardError(f"--input-dir {folder}: {error}") from error
    if not paths:
        raise ReshardError(f"--input-dir {folder}: holds no .tar file. Give the folder with the shards.")
    with told_to_user("--input-dir"):
        files = [SourceFile(os.path.basename(path), *_stat(path)) for path in paths]
        beside = [
            _stat(path) for path in (os.path.splitext(path)[0] + ".parquet" for path in paths) if os.path.exists(path)
        ]
    rows = [[file.name, file.num_bytes, file.mtime_ns] for file in files]
    digest = hashlib.blake2b(json.dumps([rows, beside]).encode(), digest_size=16).hexdigest()
    return Pool(folder, files, digest)


def dry_plan(options: ReshardOptions, pool: ProcessPoolExecutor | None, progress: Progress) -> tuple[Match, Plan]:
    """Scan and plan in memory; writes nothing."""
    request = load_request(options.subset_file) if options.subset_file else None
    shards = find_pool(options.input_dir)
    match = match_pool(request, _scanned(options, shards, pool, progress, None))
    return match, make_plan(match.rows, options.cut, options.shuffle_seed)


def prepare(options: ReshardOptions, pool: ProcessPoolExecutor | None, progress: Progress) -> SavedPlan:
    """The plan in the output folder: the one that is there if it is of these options, else a new one.

    Raises `ReshardError` for a folder with anything else in it.
    """
    if options.where:
        parse_predicate(options.where)  # what is not understood is refused before anything is written
    request = load_request(options.subset_file) if options.subset_file else None
    shards = find_pool(options.input_dir)
    settings = options.settings(request.digest if request else "", shards.digest)
    state = options.output_dir / FOLDER
    if (state / "plan.json").exists():
        saved = load_plan(options.output_dir)
        check_plan(saved, settings)
        return saved
    _claim(options.output_dir)
    files: list[SourceFile] = []
    match = match_pool(request, _scanned(options, shards, pool, progress, files))
    texts = _missing_texts(request, match)
    del request  # its place is needed for the order
    plan = make_plan(match.rows, options.cut, options.shuffle_seed)
    return save_plan(options.output_dir, settings, match, plan, files, texts)


def _claim(folder: Path) -> None:
    """Make the output folder ours; raises `ReshardError` when something else is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    other = sorted(set(os.listdir(folder)) - {FOLDER})
    if other:
        raise ReshardError(
            f"--output-dir {folder}: is not empty and holds no plan of a reshard (first: {other[0]}). "
            "Give a new folder: nothing is overwritten or deleted here."
        )
    (folder / FOLDER / "tmp").mkdir(parents=True, exist_ok=True)


def _scanned(
    options: ReshardOptions,
    shards: Pool,
    pool: ProcessPoolExecutor | None,
    progress: Progress,
    planned: list[SourceFile] | None,
) -> Iterator[ScannedShard]:
    """Scan all shards in order; `planned` gets each as the plan should know it, None for a plan that is not saved."""
    predicate = parse_predicate(options.where) if options.where else None
    scan = partial(scan_shard, shards.folder, predicate=predicate)
    samples = 0
    for number, shard in enumerate(ordered(pool, scan, [file.name for file in shards.files], 4 * options.num_workers)):
        if planned is not None:
            if shard.index is not None:
                save_odd_index(options.output_dir, number, shard.index)
            file = shards.files[number]
            planned.append(SourceFile(file.name, file.num_bytes, file.mtime_ns, shard.index is None))
        samples += len(shard.uids.high)
        progress("reading headers", number + 1, len(shards.files), samples)
        yield shard


def _missing_texts(request: Request | None, match: Match) -> dict[str, str]:
    if request is None or not request.texts:
        return {}
    pairs = zip(match.missing.high.tolist(), match.missing.low.tolist(), strict=True)
    return {uid_text(*pair): request.texts[pair] for pair in pairs if pair in request.texts}


def _stat(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
