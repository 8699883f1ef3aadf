"""What a member's name means in a shard, and the error of everything here."""

from __future__ import annotations

import re

# webdataset's rules: the key ends at the first dot of the base name; `__name__` members are its own metadata.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")


class ShardError(ValueError):
    """A shard pattern, file or member that cannot be used; the message names it and the remedy."""


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member's name; None when it is no part of a sample."""
    key, _, extension = name.partition(".")
    if key and extension and "/" not in name and key[0] != "_":
        return key, extension.lower()  # nearly every name there is, in a third of the time
    match = _KEY_AND_EXTENSION.fullmatch(name)
    if match is None or _METADATA.match(name):
        return None
    return match.group(1), match.group(2).lower()


def is_unsafe(name: str) -> bool:
    """Whether a name would leave its folder if a tool took it for a path."""
    return name.startswith("/") or "\0" in name or ".." in name.split("/")
