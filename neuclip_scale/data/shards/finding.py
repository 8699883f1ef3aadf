"""From what a person writes in `data.train` to a sorted list of shard paths."""

from __future__ import annotations

import glob
import os

from braceexpand import braceexpand

from neuclip_scale.data.shards.names import ShardError


def expand_shards(pattern: str) -> list[str]:
    """Paths of the shards that `pattern` names, sorted, each once.

    A pattern is a folder (its `*.tar`), a brace pattern (`/data/{00000..01023}.tar`), a glob, a file, or
    several of these joined with `::`. Raises `ShardError` when a part matches nothing or a named file is
    not there.
    """
    parts = [part for part in map(str.strip, pattern.split("::")) if part]
    if not parts:
        raise ShardError(f"shards {pattern!r}: empty. Give a folder of .tar files or a pattern.")
    return sorted({path for part in parts for path in _expand_part(part)})


def _expand_part(part: str) -> list[str]:
    try:
        names = list(braceexpand(part, escape=False))
    except ValueError as error:
        raise ShardError(f"shards {part!r}: {error}. Write ranges as {{00000..01023}}.") from error
    matches = [_matches(name) for name in names]
    missing = [name for name, found in zip(names, matches, strict=True) if not found]
    if missing:
        raise ShardError(
            f"shards {part!r}: {len(missing)} of {len(names)} name(s) match no file, first {missing[0]!r}. "
            "Check the path (a mounted folder, not a URL) and the range."
        )
    return [path for found in matches for path in found]


def _matches(name: str) -> list[str]:
    if os.path.isdir(name):
        return glob.glob(os.path.join(glob.escape(name), "*.tar"))
    return [name] if os.path.exists(name) else glob.glob(name)
