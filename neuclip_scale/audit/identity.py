"""What makes two records the same sample: the uid, or where the list has none the MD5 of the url.

Uids are 32 hexadecimal digits in small letters; DataComp's tools pad those that lost leading zeros, and so does this.
Any other text is taken as it is.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

Identity = Literal["uid", "url"]

_HEX = "^[0-9a-fA-F]{25,32}$"
_HEX_PATTERN = re.compile(_HEX)


def normal_uid(text: str) -> str:
    """The uid as it is compared."""
    return text.lower().rjust(32, "0") if _HEX_PATTERN.match(text) else text


def normal_uids(column: Any) -> Any:
    """`normal_uid` of an Ibis column of texts."""
    import ibis

    return ibis.cases((column.re_search(_HEX), column.lower().lpad(32, "0")), else_=column)


def url_uid(url: str) -> str:
    """The uid of a sample that is known by its url."""
    return hashlib.md5(url.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()


def url_uids(column: Any) -> Any:
    """`url_uid` of an Ibis column."""
    return column.hexdigest("md5")
