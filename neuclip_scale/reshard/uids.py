"""Uids as pairs of 64-bit numbers, the form of DataComp's subset files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# DataComp's uids are 32 digits; its tools pad those that lost leading zeros on the way.
_HEX = re.compile(r"[0-9a-fA-F]{25,32}")
_NIBBLES = np.full(256, 255, dtype=np.uint8)
for _value, _digits in enumerate(zip("0123456789abcdef", "0123456789ABCDEF", strict=True)):
    for _digit in _digits:
        _NIBBLES[ord(_digit)] = _value


class Uids(NamedTuple):
    """128-bit numbers, high and low 64 bits of each."""

    high: np.ndarray  # [n] uint64
    low: np.ndarray  # [n] uint64


def parse_uids(texts: Sequence[str]) -> tuple[Uids, dict[int, str]]:
    """Numbers of `texts`, and the texts by row that are no 32 hexadecimal digits.

    The number of such a text (a key, a URL) is its 128-bit hash: equal texts are equal numbers.
    """
    parsed = _parse_digits(texts)
    if parsed is not None:
        return parsed, {}
    others = {row: text for row, text in enumerate(texts) if not _HEX.fullmatch(text)}
    numbers = [_hash(text) if row in others else int(text, 16) for row, text in enumerate(texts)]
    high = np.array([number >> 64 for number in numbers], dtype=np.uint64)
    low = np.array([number & (1 << 64) - 1 for number in numbers], dtype=np.uint64)
    return Uids(high, low), others


def uid_text(high: int, low: int) -> str:
    """32 hexadecimal digits."""
    return f"{high:016x}{low:016x}"


def _parse_digits(texts: Sequence[str]) -> Uids | None:
    """The numbers if all texts are 32 hexadecimal digits, else None."""
    joined = "".join(texts).encode("utf-8", "surrogateescape")
    if len(joined) != 32 * len(texts) or any(len(text) != 32 for text in texts):
        return None
    digits = _NIBBLES[np.frombuffer(joined, dtype=np.uint8)]
    if (digits == 255).any():
        return None
    pairs = (digits[::2] << 4 | digits[1::2]).view(">u8").astype(np.uint64)
    return Uids(pairs[::2].copy(), pairs[1::2].copy())


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16, person=b"neuclip uid")
    return int.from_bytes(digest.digest(), "big")
