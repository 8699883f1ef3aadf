"""One output shard: copied, verified, not yet under its name."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from neuclip_scale.data.shards.index import index_plain_shard
from neuclip_scale.reshard.buffers import Buffer
from neuclip_scale.reshard.errors import ReshardError, told_to_user
from neuclip_scale.reshard.images import IMAGE_EXTENSIONS, ImageError, ImageWork, face_boxes
from neuclip_scale.reshard.matching import Rows
from neuclip_scale.reshard.patching import patch
from neuclip_scale.reshard.sources import Part, Sources
from neuclip_scale.reshard.state import SavedPlan, load_plan
from neuclip_scale.reshard.tar_header import BLOCK
from neuclip_scale.reshard.writing import Writer

_BATCH_BLOCKS = 4096
"""Samples renamed and written together: 2 MiB, or one that is larger."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class CopyJob:
    """What every output shard of a run has in common; small, and it pickles."""

    folder: Path
    """Output folder, with the plan in it."""
    input_dir: Path
    images: ImageWork
    tag: str
    """Part of the temporary names, so that two machines never write one file."""

    def partial(self, number: int) -> Path:
        """Where output `number` is written before it is complete."""
        return self.folder / ".reshard" / "tmp" / f"{output_name(number)}.{self.tag}"


@dataclass
class CopiedShard:
    """A complete output shard, as the journal keeps it."""

    number: int
    samples: int = 0
    members: int = 0
    num_bytes: int = 0
    checksum: int = 0
    """CRC-32 over the CRC-32 of every member in file order, each as four bytes, little-endian."""
    without_boxes: int = 0
    """Samples whose json names no `face_bboxes`, where faces are to be blurred."""
    corrupt: list[tuple[str, str, str]] = field(default_factory=list)
    """Samples dropped: input shard, key they would have had, reason."""


Written = dict[int, list[int]]
"""CRC-32 of each member, by row of the output."""


def output_name(number: int) -> str:
    """File name of an output shard, as DataComp's resharder names them."""
    return f"{number:08d}.tar"


def copy_output(job: CopyJob, number: int) -> CopiedShard:
    """Write output shard `number` under its temporary name; every byte is read back (`Writer`).

    The bytes depend on the plan alone. Not yet flushed to the disk, nor renamed: see `running`. Raises `ReshardError`.
    """
    saved = _plan(job.folder)
    rows = saved.plan.output(number)
    keys = sample_keys(number, len(rows), saved.plan.key_digits)
    path = job.partial(number)
    result = CopiedShard(number)
    with (
        told_to_user(f"copying to {output_name(number)}"),
        open(path, "w+b", buffering=0) as file,
        Sources(saved, job.input_dir) as sources,
    ):
        writer = Writer(file.fileno())
        if job.images:
            written = _write_in_order(writer, sources, rows, keys, job, result)
        else:
            written = _write_by_source(writer, sources, rows, keys)
        result.num_bytes = os.fstat(file.fileno()).st_size
    result.samples = len(written)
    result.members, result.checksum = _summed(written)
    return result


def sample_keys(number: int, count: int, digits: int) -> list[str]:
    """Keys of an output shard: its number and the sample's, unique in the whole output."""
    return [f"{number:08d}{position:0{digits}d}" for position in range(count)]


def source_checksum(job: CopyJob, number: int) -> int:
    """What `CopiedShard.checksum` must be by the input shards, read anew; for copies without `ImageWork`."""
    rows = _plan(job.folder).plan.output(number)
    with Sources(_plan(job.folder), job.input_dir) as sources:
        triples = zip(rows.shard.tolist(), rows.first.tolist(), rows.length.tolist(), strict=True)
        return _combined([zlib.crc32(part.data) for triple in triples for part in sources.read(*triple)])


def file_checksum(path: Path) -> int:
    """What `CopiedShard.checksum` is by the file at `path`; raises `ReshardError` if it is not a whole tar of ours."""
    index = index_plain_shard(path)
    if index is None or index.fault:
        raise ReshardError(f"{path}: is not the tar that was written. Delete it and run the same command again.")
    return _combined(list(_member_crcs(path, index.member_offset, index.member_size)))


@lru_cache(maxsize=2)
def _plan(folder: Path) -> SavedPlan:
    return load_plan(folder)


def _write_by_source(writer: Writer, sources: Sources, rows: Rows, keys: list[str]) -> Written:
    """Copy all rows in the order they have in the input, each to the place the plan gives it: input is read forward."""
    ends = np.cumsum(rows.written, dtype=np.int64) * BLOCK
    offsets, room = np.append(0, ends[:-1]).tolist(), np.diff(ends, prepend=0).tolist()
    order = np.lexsort((rows.first, rows.shard)).tolist()
    triples = list(zip(rows.shard.tolist(), rows.first.tolist(), rows.length.tolist(), strict=True))
    is_plain = [sources.is_plain(shard) for shard, *_ in triples]
    written, spare = Written(), Buffer()
    for batch in _batches(order, is_plain, [length for *_, length in triples]):
        if is_plain[batch[0]]:
            extents = sources.read_extents([triples[row] for row in batch])
            lengths = [triples[row][2] * BLOCK for row in batch]
            patched = patch(extents, lengths, [keys[row] for row in batch], spare)
            # A sample that takes other room than planned has members that are dropped.
            if patched is not None and patched.lengths == [room[row] for row in batch]:
                writer.write_extents(patched.content, patched.lengths, [offsets[row] for row in batch])
                written.update(zip(batch, patched.crcs, strict=True))
                continue
        for row in batch:
            written[row] = writer.add_sample(offsets[row], keys[row], sources.read(*triples[row]))
            if writer.end != ends[row]:
                raise ReshardError(
                    f"input shard {triples[row][0]}: a sample takes other room than planned. Begin anew."
                )
    writer.finish(int(ends[-1]) if len(ends) else 0)
    return written


def _batches(order: list[int], kind: list[bool], lengths: list[int]) -> Iterator[list[int]]:
    """Rows that follow each other and are of one kind, up to `_BATCH_BLOCKS` of them together."""
    batch: list[int] = []
    blocks = 0
    for row in order:
        if batch and (kind[row] != kind[batch[0]] or blocks + lengths[row] > _BATCH_BLOCKS):
            yield batch
            batch, blocks = [], 0
        batch.append(row)
        blocks += lengths[row]
    if batch:
        yield batch


def _write_in_order(
    writer: Writer, sources: Sources, rows: Rows, keys: list[str], job: CopyJob, result: CopiedShard
) -> Written:
    """Copy all rows with their pictures worked on; those that do not decode are left out and told in `result`."""
    offset, written = 0, Written()
    for row, key in enumerate(keys):
        shard = int(rows.shard[row])
        members = sources.read(shard, int(rows.first[row]), int(rows.length[row]))
        try:
            members = _worked_on(members, job.images, result)
        except ImageError as error:
            result.corrupt.append((_plan(job.folder).sources[shard].name, key, f"its picture cannot be used ({error})"))
            continue
        written[row] = writer.add_sample(offset, key, members)
        offset = writer.end
    writer.finish(offset)
    return written


def _worked_on(members: list[Part], images: ImageWork, result: CopiedShard) -> list[Part]:
    boxes = None
    if images.blur_faces:
        raw = next((part.data for part in members if part.extension == "json"), None)
        boxes = None if raw is None else face_boxes(bytes(raw))
        result.without_boxes += boxes is None
    done, seen = [], {part.extension for part in members}
    for extension, data in members:
        if extension in IMAGE_EXTENSIONS:
            name, data = images.apply(extension, bytes(data), boxes or ())
            if name != extension and name in seen:
                raise ImageError(f"it has a {name} beside its {extension}")
            seen.add(name)
            extension = name
        done.append(Part(extension, data))
    return done


def _summed(written: Written) -> tuple[int, int]:
    """Number of members, and `CopiedShard.checksum`."""
    crcs = [crc for row in sorted(written) for crc in written[row]]
    return len(crcs), _combined(crcs)


def _member_crcs(path: Path, offsets: np.ndarray, sizes: np.ndarray) -> Iterator[int]:
    """CRC-32 of members, read in runs of a MiB."""
    with open(path, "rb", buffering=0) as file:
        block, begin = memoryview(b""), 0
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if offset + size > begin + len(block):
                block, begin = memoryview(os.pread(file.fileno(), max(size, _READ_BYTES), offset)), offset
            yield zlib.crc32(block[offset - begin : offset - begin + size])


def _combined(crcs: list[int]) -> int:
    return zlib.crc32(struct.pack(f"<{len(crcs)}I", *crcs))
