"""The members of one tar, found by its headers, and the bytes of one of them."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neuclip_scale.data.shards.names import ShardError, is_unsafe, split_name, split_names
from neuclip_scale.data.shards.plain import PlainFiles, plain_files

MAX_MEMBER_BYTES = 64 << 20
"""Larger members are refused: no picture or caption of a training set comes near it."""

HOLDS_NO_SAMPLE = "holds no sample"
"""The only fault of a tar that is whole and empty."""

MAX_HEADER_BYTES = 1 << 20
"""Longest extended (pax, GNU) header that is read; a longer one is an attack or damage."""


class MemberSpan(NamedTuple):
    """Where a member's bytes stand in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """Members of one shard, grouped by key; about 150 bytes a sample.

    Sample `p` owns rows `starts[p]:starts[p + 1]` of the three member arrays.
    """

    path: str
    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    starts: np.ndarray  # [num_samples + 1] int64
    member_extension: np.ndarray  # [num_members] int32, row in `extensions`
    member_offset: np.ndarray  # [num_members] int64, bytes
    member_size: np.ndarray  # [num_members] int64, bytes
    num_bytes: int
    fault: str = ""
    """What is wrong with the shard; empty when nothing is."""

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    def members(self, position: int) -> dict[str, MemberSpan]:
        """Extension (lower case) -> span, for the sample at `position`."""
        rows = slice(int(self.starts[position]), int(self.starts[position + 1]))
        names = (self.extensions[i] for i in self.member_extension[rows])
        spans = map(MemberSpan, self.member_offset[rows].tolist(), self.member_size[rows].tolist())
        return dict(zip(names, spans, strict=True))


def index_shard(path: str | os.PathLike[str]) -> ShardIndex:
    """Index a plain (uncompressed) tar by its headers, without reading or extracting any member.

    Consecutive members of one key form a sample, as in webdataset. Only regular files count; links, devices,
    sparse files, absolute names and names with `..` are ignored. Damage (a cut-off or corrupt tar) ends the
    scan and is told in `fault`. Raises OSError when the file itself cannot be read.
    """
    path = os.fspath(path)
    return index_plain_shard(path) or _index_by_tarfile(path)


def index_plain_shard(path: str | os.PathLike[str]) -> ShardIndex | None:
    """What `index_shard` returns, for a tar of nothing but plain files with samples in it, else None; see `plain`."""
    path = os.fspath(path)
    with open(path, "rb", buffering=0) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        files = plain_files(stream.fileno(), num_bytes)
    if files is None:
        return None
    usual = _index_usual_names(path, num_bytes, files)
    if usual is not None:
        return usual
    builder = _IndexBuilder()
    names = [raw.decode(tarfile.ENCODING, "surrogateescape") for raw in files.names.view("S100")[:, 0].tolist()]
    for name, offset, size in zip(names, files.offsets.tolist(), files.sizes.tolist(), strict=True):
        builder.add_file(name, offset, size)
    return builder.build(path, num_bytes, "")


def _index_usual_names(path: str, num_bytes: int, files: PlainFiles) -> ShardIndex | None:
    """What `_IndexBuilder` makes of the files, all at once, if `split_names` knows their names and none is repeated."""
    split = split_names(files.names)
    if split is None:
        return None
    keys, extensions = split
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
    begins = np.flatnonzero(is_first)
    numbers: dict[bytes, int] = {}
    rows = np.array([numbers.setdefault(extension, len(numbers)) for extension in extensions.tolist()], dtype=np.int32)
    if len(np.unique(np.cumsum(is_first) * len(numbers) + rows)) < len(rows):
        return None
    return ShardIndex(
        path=path,
        keys=tuple(key.decode(tarfile.ENCODING, "surrogateescape") for key in keys[begins].tolist()),
        extensions=tuple(extension.decode() for extension in numbers),
        starts=np.append(begins, len(rows)),
        member_extension=rows,
        member_offset=files.offsets,
        member_size=files.sizes,
        num_bytes=num_bytes,
    )


def _index_by_tarfile(path: str) -> ShardIndex:
    """The slow road, which knows every kind of tar and every kind of damage."""
    builder = _IndexBuilder()
    with _BoundedReader(path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        damage = _scan(stream, num_bytes, builder)
    return builder.build(path, num_bytes, damage)


def read_member(descriptor: int, span: MemberSpan, *, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Bytes of one member of an open shard, by pread: thread-safe, moves no file position.

    Raises `ShardError` for a member over `max_bytes` (before reading it) or a file shorter than its index.
    """
    offset, size = span
    if size > max_bytes:
        raise ShardError(f"member of {size} bytes, more than the {max_bytes} allowed")
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    if size:
        raise ShardError(f"member ends {size} bytes after its shard: the shard was cut after it was indexed")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _BoundedReader(io.FileIO):
    """A file whose reads are bounded: tarfile reads extended headers whole, whatever size they claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def _scan(stream: _BoundedReader, num_bytes: int, builder: _IndexBuilder) -> str:
    """Feed every whole member to `builder`; returns the damage that ended the scan, empty at a proper end."""
    offset = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                offset, end = member.offset, member.offset_data + member.size
                # A crafted negative size would move the scan backwards and never let it end.
                if member.size < 0 or archive.offset <= offset:
                    return f"impossible member size {member.size} at byte {offset}"
                if member.isreg() and not member.issparse() and end > num_bytes:
                    return f"cut off at byte {num_bytes}, inside a member that ends at {end}"
                builder.add(member)
                archive.members = []  # type: ignore[attr-defined]  # it keeps every header it has seen
            offset = archive.offset
            stream.seek(offset)
            block = stream.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        return f"damaged at byte {offset} ({error})" if offset else f"not a plain tar file ({error})"
    # tarfile takes any bad header after the first for the end; only a block of zeros is one.
    if len(block) < tarfile.BLOCKSIZE:
        return f"cut off at byte {num_bytes}: no end-of-archive block"
    return f"corrupt header at byte {offset}" if any(block) else ""


class _IndexBuilder:
    """Collects the members of one shard in file order."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.extensions: dict[str, int] = {}
        self.rows: list[tuple[int, int, int]] = []
        self.num_ignored = 0
        self.current: set[str] = set()
        self.previous: set[str] = set()

    def add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            self.num_ignored += 1
            return
        self.add_file(member.name, member.offset_data, member.size)

    def add_file(self, name: str, offset: int, size: int) -> None:
        """Add a regular file."""
        if is_unsafe(name):
            self.num_ignored += 1
            return
        parts = split_name(name)
        if parts is None:
            return
        key, extension = parts
        if not self.keys or key != self.keys[-1]:
            self.keys.append(key)
            self.starts.append(len(self.rows))
            self.previous, self.current = self.current, set()
        if extension in self.current:
            self.num_ignored += 1
            return
        self.current.add(extension)
        number = self.extensions.setdefault(extension, len(self.extensions))
        self.rows.append((number, offset, size))

    def build(self, path: str, num_bytes: int, damage: str) -> ShardIndex:
        faults = [damage] if damage else []
        if damage and self.keys and not self.current >= self.previous:
            # Cut between the members of a sample: the last one has fewer than the one before it.
            self.keys.pop()
            del self.rows[self.starts.pop() :]
        if self.num_ignored:
            faults.append(f"{self.num_ignored} member(s) ignored (links, repeated or unsafe names)")
        if not self.keys:
            faults.append(HOLDS_NO_SAMPLE)
        table = np.asarray(self.rows, dtype=np.int64).reshape(-1, 3)
        return ShardIndex(
            path=path,
            keys=tuple(self.keys),
            extensions=tuple(self.extensions),
            starts=np.asarray([*self.starts, len(self.rows)], dtype=np.int64),
            member_extension=table[:, 0].astype(np.int32),
            member_offset=table[:, 1].copy(),
            member_size=table[:, 2].copy(),
            num_bytes=num_bytes,
            fault="; ".join(faults),
        )
