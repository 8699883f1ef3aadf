"""Uids in the form in which they are compared: 32 hexadecimal digits in small letters.

DataComp's tools pad those that lost leading zeros, and so does this. Any other text is taken as it is.
"""

from __future__ import annotations

import re
from typing import Any

_HEX = "^[0-9a-fA-F]{25,32}$"
_HEX_PATTERN = re.compile(_HEX)


def normal_uid(text: str) -> str:
    """The uid as it is compared."""
    return text.lower().rjust(32, "0") if _HEX_PATTERN.match(text) else text


def normal_uids(column: Any) -> Any:
    """`normal_uid` of an Ibis column of texts."""
    import ibis

    return ibis.cases((column.re_search(_HEX), column.lower().lpad(32, "0")), else_=column)
