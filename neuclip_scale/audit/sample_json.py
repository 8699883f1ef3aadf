"""What the json of a sample tells: img2dataset's record of the download, inside the tar."""

from __future__ import annotations

from typing import NamedTuple

from neuclip_scale.data.shards import MemberSpan, read_member
from neuclip_scale.reshard.json_uid import json_object, sayable

_MAX_BYTES = 1 << 20


class Record(NamedTuple):
    """None for what is not there, or not what it should be."""

    uid: str | None = None
    url: str | None = None
    sha256: str | None = None
    """Of the bytes that the url gave, in small letters."""
    original_width: int | None = None
    original_height: int | None = None


def read_record(descriptor: int, span: MemberSpan) -> Record:
    """Read the json at `span` of an open tar; raises ValueError for one that is too large or no JSON object."""
    value = json_object(read_member(descriptor, span, max_bytes=_MAX_BYTES))  # ShardError is a ValueError
    uid, url, sha256 = value.get("uid"), value.get("url"), value.get("sha256")
    return Record(
        None if uid is None else sayable(str(uid)),
        sayable(url) if isinstance(url, str) else None,
        sayable(sha256.lower()) if isinstance(sha256, str) else None,
        *(_pixels(value.get(side)) for side in ("original_width", "original_height")),
    )


def _pixels(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 31 else None
