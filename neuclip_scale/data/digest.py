"""Digests of what was in a batch, to prove that two runs saw the same samples in the same order.

Of two kinds: a sample's uid says which pair it is meant to be, its contents which picture and caption were read.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable


def uids_digest(uids: Iterable[str]) -> int:
    """63-bit digest of uids in order; fits a non-negative int64, so that ranks can gather it."""
    return _digest("\n".join(uids).encode("utf-8", "surrogateescape"))  # keys from a tar may not be UTF-8


def content_of(image: bytes, caption: str) -> bytes:
    """8 bytes of a pair as it was read: checksums of the picture's file, not decoded, and of the caption drawn."""
    checksums = zlib.crc32(image), zlib.crc32(caption.encode("utf-8", "surrogatepass"))
    return b"".join(checksum.to_bytes(4, "little") for checksum in checksums)


def contents_digest(contents: Iterable[bytes]) -> int:
    """63-bit digest of what `content_of` made of pairs, in order."""
    return _digest(b"".join(contents))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def batch_digest(stream_digests: Iterable[int]) -> str:
    """16 hex digits from the digests of ALL streams in order; equal at any world size."""
    data = b"".join(int(digest).to_bytes(8, "little") for digest in stream_digests)
    return hashlib.blake2b(data, digest_size=8).hexdigest()
