"""Host, domain and top-level domain of a url, in Python and as Ibis expressions.

RE2 and Java agree on these regular expressions, not on all.
"""

from __future__ import annotations

import re
from typing import Any

_HOST = "^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)"
_PATTERN = re.compile(_HOST)
_IP_ADDRESS = "^[0-9]+[.][0-9]+[.][0-9]+[.][0-9]+$"
_SHORT_SECOND = "([^.]+[.](?:co|com|org|net|ac|gov|edu|gob|gouv|or|ne|go)[.][a-z]{2})$"
_LAST_TWO = "([^.]+[.][^.]+)$"
_NOT_HOST = r"/?#\\\t\n\r "
# Last label of the host, or the bracket that opens an IPv6 address; one expression, as it is most of the work.
_LABEL = (
    rf"^[ ]*[A-Za-z][A-Za-z0-9+.-]*://(?:[^{_NOT_HOST}]*@)?"
    rf"(?:[^{_NOT_HOST}:@\[]*\.)?(\[|[^{_NOT_HOST}:@\[.]+)"
)


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


def top_level_domain(url: Any) -> Any:
    """Last label of the host in small letters; `(none)` without a host, `(IP address)` for one."""
    label = url.re_extract(_LABEL, 1)
    is_address = label.re_search(r"^[0-9]+$|^\[$")  # no domain ends in digits alone
    return (label.length() == 0).ifelse("(none)", is_address.ifelse("(IP address)", label.lower()))
