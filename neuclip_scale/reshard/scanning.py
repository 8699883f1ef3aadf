"""One input shard: which samples it holds, their uids, and where their bytes stand."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from neuclip_scale.data.shards import MAX_MEMBER_BYTES, ShardIndex, index_shard
from neuclip_scale.data.shards.index import index_plain_shard
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.json_uid import json_uid, plain_uids
from neuclip_scale.reshard.predicate import Predicate
from neuclip_scale.reshard.sidecar import Sidecar, read_sidecar
from neuclip_scale.reshard.uids import Uids, parse_uids

BLOCK = 512
_JSONS_AT_ONCE, _JSON_BYTES = 1024, 1 << 16
"""Read together; a larger one is read by itself."""
_EXTENSION_BYTES = 80
"""Of the longest extension: a header holds 100 of a name, of which the new key and the dot take 19 at most."""


@dataclass(frozen=True)
class CorruptItem:
    """A shard, or a sample of it, that cannot be used or only in part."""

    shard: str
    key: str
    """Empty for the shard itself."""
    reason: str


@dataclass(frozen=True)
class Extents:
    """Where samples stand in a shard: 512-byte blocks from a sample's first header to the end of its last member."""

    first: np.ndarray  # [n] uint32
    length: np.ndarray  # [n] uint32
    written: np.ndarray  # [n] uint32, blocks the sample takes in an output, which drops extended headers


@dataclass(frozen=True)
class ScannedShard:
    """The usable samples of one shard, in file order."""

    name: str
    """Relative to the input folder."""
    uids: Uids
    extents: Extents
    wanted: np.ndarray | None = None
    """[n] bool, whether the predicate holds; None without one."""
    uid_texts: dict[int, str] = field(default_factory=dict)
    """Those, by row, that are no 32 hexadecimal digits."""
    corrupt: tuple[CorruptItem, ...] = ()
    """What cannot be used: samples, and the shard itself where it is damaged."""
    num_corrupt_samples: int = 0
    sidecar_fault: str = ""
    """Why the parquet beside the shard was not believed."""
    index: ShardIndex | None = None
    """For a shard that is no plain tar, whose extents cannot be read by their headers alone."""


def scan_shard(folder: Path, name: str, predicate: Predicate | None = None) -> ScannedShard:
    """Index one shard of the pool in `folder` and find the uids of its samples.

    The uid is the `uid` of the sample's json; without one, the parquet's where that fits the tar; without either, the
    key. A parquet that contradicts a json is believed in nothing. A shard that cannot be read is corrupt, and holds no
    sample. Raises `ReshardError` for a predicate that cannot be evaluated.
    """
    path = folder / name
    try:
        plain = index_plain_shard(path)
        index = plain or index_shard(path)
        told, reasons = _json_uids(path, index)
    except OSError as error:
        return _unreadable(name, error.strerror or str(error))
    sidecar = read_sidecar(path, index.keys, predicate)
    mismatch = _mismatch(index.keys, told, sidecar)
    believed = sidecar.uids if sidecar.uids and not mismatch else [None] * index.num_samples
    uids, texts = parse_uids([a or b or key for a, b, key in zip(told, believed, index.keys, strict=True)])
    extents, too_large = _extents(index)
    reasons.update(dict.fromkeys(np.flatnonzero(too_large).tolist(), f"a member of over {MAX_MEMBER_BYTES} bytes"))
    reasons.update(dict.fromkeys(_with_long_extensions(index), f"an extension of over {_EXTENSION_BYTES} bytes"))
    usable = np.ones(index.num_samples, dtype=bool)
    usable[list(reasons)] = False
    row_of = np.cumsum(usable) - 1
    faults = [CorruptItem(name, "", index.fault)] if index.fault else []
    return ScannedShard(
        name,
        Uids(uids.high[usable], uids.low[usable]),
        Extents(*(getattr(extents, part)[usable].astype(np.uint32) for part in ("first", "length", "written"))),
        None if sidecar.wanted is None else np.array(sidecar.wanted, dtype=bool)[usable],
        {int(row_of[row]): text for row, text in texts.items() if usable[row]},
        (*faults, *(CorruptItem(name, index.keys[row], reason) for row, reason in sorted(reasons.items()))),
        len(reasons),
        sidecar.fault or mismatch,
        None if plain else index,
    )


def _unreadable(name: str, reason: str) -> ScannedShard:
    empty = np.empty(0, dtype=np.uint32)
    return ScannedShard(
        name,
        Uids(empty.astype(np.uint64), empty.astype(np.uint64)),
        Extents(empty, empty, empty),
        wanted=empty.astype(bool),
        corrupt=(CorruptItem(name, "", reason),),
    )


def _json_uids(path: Path, index: ShardIndex) -> tuple[list[str | None], dict[int, str]]:
    """Uid by each sample's json, None where it has none; and why a json cannot be read, by sample."""
    uids: list[str | None] = [None] * index.num_samples
    reasons: dict[int, str] = {}
    if "json" not in index.extensions:
        return uids, reasons
    is_json = index.member_extension == index.extensions.index("json")
    members = np.flatnonzero(is_json & (index.member_size <= MAX_MEMBER_BYTES))  # others are told for their size
    samples = np.searchsorted(index.starts, members, side="right") - 1
    spans = list(zip(index.member_size[members].tolist(), index.member_offset[members].tolist(), strict=True))
    with open(path, "rb", buffering=0) as stream:
        descriptor = stream.fileno()
        for begin in range(0, len(members), _JSONS_AT_ONCE):
            rows = slice(begin, begin + _JSONS_AT_ONCE)
            raws = [os.pread(descriptor, *span) if span[0] <= _JSON_BYTES else b"" for span in spans[rows]]
            for sample, span, raw, uid in zip(samples[rows].tolist(), spans[rows], raws, plain_uids(raws), strict=True):
                try:
                    uids[sample] = uid or json_uid(raw or os.pread(descriptor, *span))
                except ValueError as error:
                    reasons[sample] = f"its json cannot be read ({error})"
    return uids, reasons


def _mismatch(keys: tuple[str, ...], told: list[str | None], sidecar: Sidecar) -> str:
    """The first contradiction between json and parquet, empty when there is none."""
    for key, here, there in zip(keys, told, sidecar.uids, strict=False):
        if here is not None and there is not None and here.lower() != there.lower():
            return f"uid of {key}: {there} in the parquet, {here} in the json"
    return ""


def _with_long_extensions(index: ShardIndex) -> list[int]:
    """Samples with a member whose name no header could hold beside its new key."""
    lengths = [len(extension.encode("utf-8", "surrogateescape")) for extension in index.extensions]
    if max(lengths, default=0) <= _EXTENSION_BYTES:
        return []
    members = np.flatnonzero(np.array(lengths)[index.member_extension] > _EXTENSION_BYTES)
    return np.unique(np.searchsorted(index.starts, members, side="right") - 1).tolist()


def _extents(index: ShardIndex) -> tuple[Extents, np.ndarray]:
    """Extents of all samples as int64, and which samples hold a member that is too large."""
    if not index.num_samples:
        empty = np.empty(0, dtype=np.int64)
        return Extents(empty, empty, empty), empty.astype(bool)
    begins, ends = index.starts[:-1], index.starts[1:]
    blocks = (index.member_size + BLOCK - 1) // BLOCK
    first = index.member_offset[begins] // BLOCK - 1
    last = index.member_offset[ends - 1] // BLOCK + blocks[ends - 1]
    if int(last[-1]) >= 1 << 32:
        raise ReshardError(f"shard {index.path}: over 2 TiB. Cut it into smaller ones first.")
    written = np.add.reduceat(blocks + 1, begins)
    too_large = np.maximum.reduceat(index.member_size, begins) > MAX_MEMBER_BYTES
    return Extents(first, last - first, written), too_large
