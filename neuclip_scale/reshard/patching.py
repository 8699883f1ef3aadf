"""Many samples at once: their bytes as they stand in a plain tar, new headers in the place of the old ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neuclip_scale.data.shards.names import split_names
from neuclip_scale.data.shards.plain import FILE_KINDS, PAX_HEADER, are_sound, octal
from neuclip_scale.reshard.tar_header import BLOCK, NAME_BYTES, member_headers

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


def patch(content: np.ndarray, lengths: Sequence[int], keys: Sequence[str]) -> Patched | None:
    """Rename the samples in `content` [bytes] uint8, in place where they stay as long as they are.

    `content` holds samples back to back, `lengths` their bytes, `keys` their new keys, equally long. Pax headers, which
    tell times only in a plain tar, are left out. None, with `content` as it was, unless the samples consist of sound
    headers of plain files with usual names (`split_names`), none there twice: other samples want a closer look
    (`tar_header.members_of`), which also says what is wrong.
    """
    blocks = content.reshape(-1, BLOCK)
    headers = _headers(blocks)
    if headers is None:
        return None
    begins = np.cumsum([0, *lengths[:-1]]) // BLOCK
    first = np.searchsorted(headers.at, begins)  # header of each sample
    is_pax = headers.blocks[:, 156] == PAX_HEADER
    is_last = np.zeros(len(is_pax), dtype=bool)
    is_last[[*(first[1:] - 1), -1]] = True
    if (headers.at[np.minimum(first, len(is_pax) - 1)] != begins).any() or (
        is_pax & (is_last | np.roll(is_pax, -1))
    ).any():
        return None
    sample = np.repeat(np.arange(len(begins)), np.diff([*first, len(is_pax)]))[~is_pax]
    old, sizes = headers.blocks[~is_pax], headers.sizes[~is_pax]
    split = split_names(old[:, :NAME_BYTES])
    if split is None or not np.isin(old[:, 156], FILE_KINDS).all():
        return None
    extensions, new_keys = split[1], np.array(keys, dtype=np.bytes_)
    if _are_repeated(sample, extensions) or not new_keys.view(np.uint8).all():
        return None
    new = member_headers(new_keys[sample], extensions, sizes)
    if new is None:
        return None
    num_blocks = (headers.ends - headers.at)[~is_pax]
    if is_pax.any():
        blocks = blocks[np.repeat(~is_pax, headers.ends - headers.at)]
    at = np.cumsum(num_blocks) - num_blocks
    blocks[at] = new
    content = blocks.reshape(-1)
    new_lengths = np.bincount(sample, weights=num_blocks).astype(np.int64) * BLOCK
    return Patched(content, new_lengths.tolist(), _crcs(content, (at + 1) * BLOCK, sizes, sample))


def _headers(blocks: np.ndarray) -> _Headers | None:
    """Headers that follow each other from the first block to the last, by their magic; None if other blocks have it."""
    at = np.flatnonzero((blocks[:, 257:262] == _MAGIC).all(axis=1))
    headers = blocks[at]
    if not len(at) or not are_sound(headers):
        return None
    sizes = octal(headers[:, 124:135])
    ends = at + 1 + (sizes + BLOCK - 1) // BLOCK
    return _Headers(at, ends, sizes, headers) if np.array_equal(ends, [*at[1:], len(blocks)]) and at[0] == 0 else None


def _are_repeated(sample: np.ndarray, extensions: np.ndarray) -> bool:
    """Whether an extension is there twice in one sample."""
    names, numbers = np.unique(extensions, return_inverse=True)
    return len(np.unique(sample * len(names) + numbers)) < len(sample)


def _crcs(content: np.ndarray, begins: np.ndarray, sizes: np.ndarray, sample: np.ndarray) -> list[list[int]]:
    view, crc32 = memoryview(content), zlib.crc32
    spans = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
    crcs = [crc32(view[begin:end]) for begin, end in spans]
    marks = [0, *np.cumsum(np.bincount(sample)).tolist()]
    return [crcs[begin:end] for begin, end in zip(marks, marks[1:], strict=False)]
