"""The uid in a sample's json, found without parsing it where that is safe."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_NAME = re.compile(rb'"uid"')
_UID = re.compile(rb'"uid"\s*:\s*"([0-9a-fA-F]{32})"')
# An object inside the object could hold another uid. A brace in a text follows a quote or a letter.
_BEFORE_NESTED = np.frombuffer(b":[, \t\n\r", dtype=np.uint8)


def json_uid(raw: bytes) -> str | None:
    """The top-level "uid" of a json member as a text, None where there is none; raises ValueError as `json_object`."""
    uid = json_object(raw).get("uid")
    return None if uid is None else sayable(str(uid))


def sayable(text: str) -> str:
    """`text` without lone surrogates, which JSON can hold and no file of texts."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def json_object(raw: bytes) -> dict[str, Any]:
    """The json member of a sample. Raises ValueError for bytes that are no JSON object."""
    try:
        value = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def plain_uids(raws: Sequence[bytes]) -> list[str | None]:
    """`json_uid` of each, in lower case, where it can be seen without parsing; None does not mean that it has none.

    It can where the json has braces at both ends, no object inside, and the name "uid" once, with 32 hexadecimal digits
    as its value. What is broken in between is seen by whoever parses it.
    """
    uids: list[str | None] = [None] * len(raws)
    joined = b"".join(raws)
    if not joined:
        return uids
    text = np.frombuffer(joined, dtype=np.uint8)
    ends = np.cumsum([len(raw) for raw in raws])
    begins = np.concatenate([[0], ends[:-1]])

    def counts(places: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many of the places are in each of the raws."""
        return np.diff(np.searchsorted(places, ends), prepend=0)

    matches = list(_UID.finditer(joined))
    places = np.array([match.start() for match in matches], dtype=np.int64)
    names = [match.start() for match in _NAME.finditer(joined)]
    braces = np.flatnonzero(text == ord("{"))
    nested = braces[np.isin(text[braces - 1], _BEFORE_NESTED) & ~np.isin(braces, begins)]
    is_plain = (counts(places) == 1) & (counts(names) == 1) & (counts(nested) == 0)
    is_plain &= (text[begins % len(text)] == ord("{")) & (text[ends - 1] == ord("}"))
    owners = np.searchsorted(ends, places, side="right")
    for owner, match in zip(owners.tolist(), matches, strict=True):
        if is_plain[owner] and joined[match.start() - 1] != ord("\\"):
            uids[owner] = match[1].decode().lower()
    return uids
