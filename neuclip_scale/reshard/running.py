"""Copying of a plan's outputs: what is complete is checked, the rest is copied, flushed, journaled and named."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from neuclip_scale.data.shards import index_shard
from neuclip_scale.files import sync_folder
from neuclip_scale.reshard.copying import CopiedShard, CopyJob, copy_output, file_checksum, output_name, source_checksum
from neuclip_scale.reshard.errors import ReshardError, told_to_user
from neuclip_scale.reshard.journal import Journal, entry_of, read_journals
from neuclip_scale.reshard.planning import Progress
from neuclip_scale.reshard.state import SavedPlan
from neuclip_scale.reshard.workers import ordered

_FLUSHING = 3
"""Outputs that wait for the disk while the next ones are copied."""


def copy_outputs(
    saved: SavedPlan,
    job: CopyJob,
    numbers: Sequence[int],
    pool: ProcessPoolExecutor | None,
    num_workers: int,
    progress: Progress,
) -> list[CopiedShard]:
    """Copy those of output shards `numbers` that are not complete; returns all of `numbers`.

    Raises `ReshardError` when a file stands in the way that no journal knows, or a complete one was changed.
    """
    with told_to_user("copying"), Journal(saved.folder, saved.digest, job.tag) as journal:
        known, _ = read_journals(saved.folder, saved.digest)
        done = [known[number] for number in numbers if _is_complete(saved, known.get(number), number)]
        left = sorted(set(numbers) - {shard.number for shard in done})
        (saved.state / "tmp").mkdir(exist_ok=True)
        num_bytes = 0
        copied = ordered(pool, partial(copy_output, job), left, 2 * num_workers)
        for count, shard in enumerate(_flushed(copied, job), 1):
            _name(saved, job, shard, journal)
            done.append(shard)
            num_bytes += shard.num_bytes
            progress("copying", len(numbers) - len(left) + count, len(numbers), num_bytes)
    return sorted(done, key=lambda shard: shard.number)


def verify_outputs(
    saved: SavedPlan,
    job: CopyJob,
    numbers: Sequence[int],
    pool: ProcessPoolExecutor | None,
    num_workers: int,
    progress: Progress,
) -> None:
    """Read every output from the disk again, and, where pictures were copied as they are, every source.

    Raises `ReshardError` at the first member that differs.
    """
    known, _ = read_journals(saved.folder, saved.digest)
    num_bytes = 0
    with told_to_user("--verify"):
        shards = [known[number] for number in numbers]
        for count, shard in enumerate(ordered(pool, partial(_verify, job), shards, 2 * num_workers), 1):
            num_bytes += shard.num_bytes
            progress("verifying", count, len(shards), num_bytes)


def _verify(job: CopyJob, shard: CopiedShard) -> CopiedShard:
    path = job.folder / output_name(shard.number)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk's bytes, not the cache's
    if shard.samples and file_checksum(path) != shard.checksum:
        raise ReshardError(f"{path}: does not hold what was written. Delete it and run the same command again.")
    if not job.images and source_checksum(job, shard.number) != shard.checksum:
        raise ReshardError(f"{path}: is not what its sources hold. Check the disk of the input, and begin anew.")
    return shard


def _is_complete(saved: SavedPlan, shard: CopiedShard | None, number: int) -> bool:
    """Whether an output is there as the journal has it; walks its headers."""
    path = saved.folder / output_name(number)
    if not path.exists():
        return False
    if shard is None:
        raise ReshardError(f"{path}: stands where an output belongs, and was not written here. Move it away.")
    index = index_shard(path) if shard.samples else None
    if path.stat().st_size != shard.num_bytes or (index and (index.fault or index.num_samples != shard.samples)):
        raise ReshardError(f"{path}: was changed since it was written. Delete it and run the same command again.")
    return True


def _flushed(copied: Iterator[CopiedShard], job: CopyJob) -> Iterator[CopiedShard]:
    """Each shard once its bytes are on the disk; the disk works while the next one is copied."""
    waiting: deque[tuple[CopiedShard, Future[None]]] = deque()
    with ThreadPoolExecutor(_FLUSHING) as threads:
        failure: ReshardError | None = None
        try:
            for shard in copied:
                waiting.append((shard, threads.submit(_flush, job.partial(shard.number))))
                while waiting and (len(waiting) > _FLUSHING or waiting[0][1].done()):
                    yield _first(waiting)
        except ReshardError as error:  # a full disk: what was copied before it is kept
            failure = error
        while waiting:
            yield _first(waiting)
        if failure is not None:
            raise failure


def _first(waiting: deque[tuple[CopiedShard, Future[None]]]) -> CopiedShard:
    shard, flushing = waiting.popleft()
    flushing.result()
    return shard


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(saved: SavedPlan, job: CopyJob, shard: CopiedShard, journal: Journal) -> None:
    """Journal a flushed shard, then give it its name."""
    path = saved.folder / output_name(shard.number)
    journal.append(**entry_of(shard))
    if path.exists():
        raise ReshardError(f"{path}: appeared while it was being written, and was not written here. Move it away.")
    os.rename(job.partial(shard.number), path)
    sync_folder(saved.folder)
