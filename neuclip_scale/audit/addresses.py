"""Host, domain and top-level domain of a url, in Python and as Ibis expressions.

The regular expressions hold no backslash: DuckDB and Spark disagree on what one means in a text.
"""

from __future__ import annotations

import re
from typing import Any

_HOST = "^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)"
_PATTERN = re.compile(_HOST)
_IP_ADDRESS = "^[0-9]+[.][0-9]+[.][0-9]+[.][0-9]+$"
_SHORT_SECOND = "([^.]+[.](?:co|com|org|net|ac|gov|edu|gob|gouv|or|ne|go)[.][a-z]{2})$"
_LAST_TWO = "([^.]+[.][^.]+)$"
_LAST = "([^.]+)$"


def host_of(url: str | None) -> str:
    """The host in small letters; empty for what is no url."""
    match = _PATTERN.match(url or "")
    return match[1].lower() if match else ""


def host(url: Any) -> Any:
    """`host_of` of a column."""
    return url.re_extract(_HOST, 1).lower().fill_null("")


def domain(host_column: Any) -> Any:
    """What one registers: the last two labels, or three below `co.uk` and its like.

    A rule, not the public suffix list, which no engine knows: `user.blogspot.com` counts as `blogspot.com`.
    """
    import ibis

    return ibis.cases(
        (host_column.re_search(_IP_ADDRESS), host_column),
        (host_column.re_search(_SHORT_SECOND), host_column.re_extract(_SHORT_SECOND, 1)),
        (host_column.re_search(_LAST_TWO), host_column.re_extract(_LAST_TWO, 1)),
        else_=host_column,
    )


def top_level_domain(host_column: Any) -> Any:
    """The last label; `(address)` for a bare number."""
    import ibis

    return ibis.cases((host_column.re_search(_IP_ADDRESS), "(address)"), else_=host_column.re_extract(_LAST, 1))
