"""What makes two records the same sample: the uid, or where the list has none the MD5 of the url."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

Identity = Literal["uid", "url"]
LISTED_UID = "neuclip_listed_uid"
"""Column with the list's own uids, where urls tell samples apart; a name that no published list uses."""


def url_uid(url: str) -> str:
    """The uid of a sample that is known by its url."""
    return hashlib.md5(url.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()


def url_uids(column: Any) -> Any:
    """`url_uid` of an Ibis column."""
    return column.hexdigest("md5")
