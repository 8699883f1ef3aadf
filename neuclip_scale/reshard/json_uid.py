"""The uid in a sample's json, found without parsing it where that is safe."""

from __future__ import annotations

import json
import re

_UID = re.compile(rb'(?<!\\)"uid"\s*:\s*"([0-9a-fA-F]{32})"')
# An object inside the object could hold another uid. A brace in a text follows a quote or a letter.
_NESTED = re.compile(rb"[:\[,]\s*[{\[]")


def json_uid(raw: bytes) -> str | None:
    """The top-level "uid" of a json member as a text, None where there is none.

    Raises ValueError for bytes that are no JSON object. The fast road looks at the braces at both ends only: what
    is broken in between is seen by whoever parses it.
    """
    match = _UID.search(raw)
    if match is not None and raw.find(b'"uid"', match.end()) < 0 and raw[:1] == b"{" and raw[-1:] == b"}":
        nested = _NESTED.search(raw)
        if nested is None:
            return match[1].decode().lower()
    try:
        value = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    uid = value.get("uid")
    return None if uid is None else str(uid)
