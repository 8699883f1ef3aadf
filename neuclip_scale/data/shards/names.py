"""What a member's name means in a shard, and the error of everything here."""

from __future__ import annotations

import re

import numpy as np

# webdataset's rules: the key ends at the first dot of the base name; `__name__` members are its own metadata.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")
_EXTENSION_BYTES = 16
"""Of the longest extension that `split_names` takes for usual."""


class ShardError(ValueError):
    """A shard pattern, file or member that cannot be used; the message names it and the remedy."""


class PatternError(ShardError):
    """What was given for shards names none."""

    exit_status = 2


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member's name; None when it is no part of a sample."""
    key, _, extension = name.partition(".")
    if key and extension and "/" not in name and key[0] != "_":
        return key, extension.lower()  # nearly every name there is, in a third of the time
    match = _KEY_AND_EXTENSION.fullmatch(name)
    if match is None or _METADATA.match(name):
        return None
    return match.group(1), match.group(2).lower()


def split_names(names: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and extensions [m] bytes of names [m, width] uint8, NULs after each: `split_name` of many at once.

    None unless all are of the usual kind: a key that is no metadata, an ASCII extension of at most 16 bytes, no folder.
    """
    width, dots = names.shape[1], (names == ord(".")).argmax(axis=1)  # 0 where there is none
    if not dots.all() or (names == ord("/")).any() or dots.max() + _EXTENSION_BYTES + 1 >= width:
        return None
    starts = np.arange(len(names)) * width + dots + 1
    rest = np.lib.stride_tricks.sliding_window_view(names.reshape(-1), _EXTENSION_BYTES + 1)[starts]
    if not rest[:, 0].all() or rest[:, -1].any() or (rest >= 0x80).any() or (names[:, 0] == ord("_")).any():
        return None
    extensions = rest[:, :-1] + np.uint8(0x20) * ((rest[:, :-1] - np.uint8(ord("A"))) < 26)  # lower case
    longest = int(dots.max())
    keys = np.where(np.arange(longest) < dots[:, None], names[:, :longest], np.uint8(0))
    return keys.view(f"S{longest}")[:, 0], extensions.view(f"S{_EXTENSION_BYTES}")[:, 0]


def is_unsafe(name: str) -> bool:
    """Whether a name would leave its folder if a tool took it for a path."""
    return name.startswith("/") or "\0" in name or ".." in name.split("/")
