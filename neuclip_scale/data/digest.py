"""Digests of what was in a batch, to prove that two runs saw the same samples in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def uids_digest(uids: Iterable[str]) -> int:
    """63-bit digest of uids in order; fits a non-negative int64, so that ranks can gather it."""
    text = "\n".join(uids)  # keys from a tar may hold bytes that are not UTF-8
    data = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(data, "little") >> 1


def batch_digest(stream_digests: Iterable[int]) -> str:
    """16 hex digits from the digests of ALL streams in order; equal at any world size."""
    data = b"".join(int(digest).to_bytes(8, "little") for digest in stream_digests)
    return hashlib.blake2b(data, digest_size=8).hexdigest()
