"""Many samples at once: their bytes as they stand in a plain tar, new headers in the place of the old ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from neuclip_scale.data.shards.names import split_names
from neuclip_scale.data.shards.plain import PAX_HEADER, are_files, are_sound, octal
from neuclip_scale.reshard.buffers import Buffer
from neuclip_scale.reshard.tar_header import BLOCK, NAME_BYTES, member_headers

_MAGIC_AT = 257
_MAGIC = np.frombuffer(b"ustar", dtype=np.uint8)


class Patched(NamedTuple):
    """Samples as they go to an output, back to back."""

    content: np.ndarray  # [bytes] uint8
    lengths: list[int]
    """Bytes of each sample."""
    crcs: list[list[int]]
    """CRC-32 of each member's bytes, by sample."""


class _Headers(NamedTuple):
    """The headers in a run of blocks, in order."""

    at: np.ndarray  # [h] int64, block
    ends: np.ndarray  # [h] int64, block after what belongs to it
    sizes: np.ndarray  # [h] int64, bytes
    blocks: np.ndarray  # [h, 512] uint8


def patch(content: np.ndarray, lengths: Sequence[int], keys: Sequence[str], spare: Buffer) -> Patched | None:
    """Rename the samples in `content` [bytes] uint8, in place where they stay as long as they are.

    `content` holds samples back to back, `lengths` their bytes, `keys` their new keys, equally long. Pax headers, which
    tell times only in a plain tar, are left out; the result is then in `spare`. None, with `content` as it was, unless
    the samples consist of sound headers of plain files with usual names (`split_names`), none there twice: other
    samples want a closer look (`tar_header.members_of`), which also says what is wrong.
    """
    blocks = content.reshape(-1, BLOCK)
    headers = _headers(blocks)
    if headers is None:
        return None
    is_file = headers.blocks[:, 156] != PAX_HEADER
    ends = np.cumsum(lengths) // BLOCK
    last = np.searchsorted(headers.ends, ends)  # header of each sample
    after_pax = np.append(False, ~is_file[:-1])
    if (headers.ends[last] != ends).any() or not (is_file[last].all() and is_file[after_pax].all()):
        return None
    old, sizes, num_blocks = headers.blocks[is_file], headers.sizes[is_file], (headers.ends - headers.at)[is_file]
    sample = np.searchsorted(ends, headers.at[is_file], side="right")
    split, new_keys = split_names(old[:, :NAME_BYTES]), np.array(keys, dtype=np.bytes_)
    if split is None or not are_files(old) or _are_repeated(sample, split[1]):
        return None
    new = member_headers(new_keys[sample], split[1], sizes)
    if new is None:
        return None
    if len(old) < len(headers.at):
        kept = np.flatnonzero(np.repeat(is_file, headers.ends - headers.at))
        blocks = np.take(blocks, kept, axis=0, out=spare.take(len(kept) * BLOCK).reshape(-1, BLOCK), mode="clip")
    at = np.cumsum(num_blocks) - num_blocks
    blocks[at] = new
    new_lengths = BLOCK * np.bincount(sample, weights=num_blocks).astype(np.int64)
    crcs = _crcs(blocks, at + 1, sizes)
    marks = [0, *np.cumsum(np.bincount(sample)).tolist()]
    of_samples = [crcs[begin:end] for begin, end in pairwise(marks)]
    return Patched(blocks.reshape(-1), new_lengths.tolist(), of_samples)


def _headers(blocks: np.ndarray) -> _Headers | None:
    """Sound headers that follow each other to the end of the blocks, found by their magic; None if there is more."""
    at = np.flatnonzero(blocks[:, _MAGIC_AT] == _MAGIC[0])
    at = at[(blocks[at, _MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC).all(axis=1)]
    headers = blocks[at]
    if not len(at) or not are_sound(headers):
        return None
    sizes = octal(headers[:, 124:135])
    ends = at + 1 + (sizes + BLOCK - 1) // BLOCK
    follow = at[0] == 0 and ends[-1] == len(blocks) and np.array_equal(ends[:-1], at[1:])
    return _Headers(at, ends, sizes, headers) if follow else None


def _are_repeated(sample: np.ndarray, extensions: np.ndarray) -> bool:
    """Whether an extension is there twice in one sample."""
    names, numbers = np.unique(extensions, return_inverse=True)
    return len(np.unique(sample * len(names) + numbers)) < len(sample)


def _crcs(blocks: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> list[int]:
    """CRC-32 of members that begin in these blocks."""
    view, crc32 = blocks.reshape(-1).data, zlib.crc32
    spans = zip((begins * BLOCK).tolist(), (begins * BLOCK + sizes).tolist(), strict=True)
    return [crc32(view[begin:end]) for begin, end in spans]
