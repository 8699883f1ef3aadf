"""From what a person writes in `data.train` to a sorted list of shard paths."""

from __future__ import annotations

import glob
import os

from braceexpand import braceexpand

from neuclip_scale.data.shards import storage
from neuclip_scale.data.shards.names import PatternError


def expand_shards(pattern: str) -> list[str]:
    """Paths of the shards that `pattern` names, sorted, each once.

    A pattern is a folder (its `*.tar`), a brace pattern (`/data/{00000..01023}.tar`), a glob, a file, an
    address (`s3://bucket/folder`, `https://host/{00000..01023}.tar`), a command (`pipe:aws s3 cp
    s3://bucket/{00000..01023}.tar -`), or several of these joined with `::`. Raises `PatternError` when a part
    matches nothing or a named file is not there; addresses without a `*` and commands are not looked up.
    """
    return sorted({path for part in split_sources(pattern) for path in expand_source(part)})


def split_sources(pattern: str) -> list[str]:
    """The parts that `::` joins; raises `PatternError` when there is none."""
    parts = [part for part in map(str.strip, pattern.split("::")) if part]
    if not parts:
        raise PatternError(f"shards {pattern!r}: empty. Give a folder of .tar files or a pattern.")
    return parts


def expand_source(part: str) -> list[str]:
    """Paths and addresses of one part of a pattern, as `expand_shards`; unsorted."""
    try:
        names = list(braceexpand(part, escape=False))
    except ValueError as error:
        raise PatternError(f"shards {part!r}: {error}. Write ranges as {{00000..01023}}.") from error
    matches = [_matches(name) for name in names]
    missing = [name for name, found in zip(names, matches, strict=True) if not found]
    if missing and os.path.isdir(missing[0]):
        inside = sorted(entry.name for entry in os.scandir(missing[0]) if entry.is_dir())
        told = f"; its folders: {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""
        raise PatternError(
            f"shards {part!r}: the folder {missing[0]!r} holds no *.tar{told}. Give the shards' own folder."
        )
    if missing:
        raise PatternError(
            f"shards {part!r}: {len(missing)} of {len(names)} name(s) match no file, first {missing[0]!r}. "
            "Check the path and the range."
        )
    return [path for found in matches for path in found]


def _matches(name: str) -> list[str]:
    if storage.is_remote(name):
        names_one = storage.is_pipe(name) or ("*" not in name and name.partition("?")[0].endswith(".tar"))
        return [name] if names_one else storage.remote_matches(name)
    if os.path.isdir(name):
        return glob.glob(os.path.join(glob.escape(name), "*.tar"))
    return [name] if os.path.exists(name) else glob.glob(name)
