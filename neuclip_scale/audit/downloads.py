"""What a download consists of: for each of its shards a tar, a parquet and a `_stats.json`, or some of these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neuclip_scale.audit.errors import AuditError, UsageError
from neuclip_scale.data.manifest import Manifest, ManifestError

MAX_STATS_BYTES = 16 << 20
_STATS = "_stats.json"


@dataclass(frozen=True)
class DownloadedShard:
    """The files of one shard; None for one that is not there."""

    name: str
    """`00000`, what the files' names have in common."""
    tar: Path | None = None
    parquet: Path | None = None
    stats: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when a file does."""
        found = []
        for path in (self.tar, self.parquet, self.stats):
            status = path.stat() if path else None
            found.append(None if status is None else [str(path), status.st_size, status.st_mtime_ns])
        return hashlib.blake2b(json.dumps(found).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Download:
    """A folder that img2dataset or `neuclip reshard` wrote, or the shards that a manifest names."""

    name: str
    """How the report calls it."""
    path: Path
    shards: tuple[DownloadedShard, ...]

    @property
    def has_tars(self) -> bool:
        return any(shard.tar for shard in self.shards)

    @property
    def has_attempts(self) -> bool:
        """Whether parquets tell what was attempted."""
        return any(shard.parquet for shard in self.shards)


def find_download(text: str, taken: Iterable[str] = ()) -> Download:
    """The download that `[NAME=]PATH` names: a folder, or a manifest.

    Without a name it is called after its folder, with a number where that name is `taken`. Raises `AuditError`.
    """
    name, mark, rest = text.partition("=")
    if not mark or "/" in name:
        name, rest = "", text
    path = Path(rest)
    base = path.stem if path.is_file() else path.resolve().name
    name = name or _slug(base)
    if name != _slug(name):
        raise UsageError(f"--download {text!r}: the name may have letters, digits, - and _.")
    if name in taken:
        if mark and "/" not in text.partition("=")[0]:
            raise UsageError(f"--download {text!r}: the name {name} was given twice.")
        name = next(f"{name}-{number}" for number in range(2, 1000) if f"{name}-{number}" not in taken)
    shards = _of_manifest(path) if path.is_file() else _of_folder(path)
    return Download(name, path, shards)


def _slug(text: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in text)


def _of_folder(path: Path) -> tuple[DownloadedShard, ...]:
    if not path.is_dir():
        raise AuditError(
            f"--download {path}: there is no such folder. Give one that img2dataset or `neuclip reshard` wrote."
        )
    files: dict[str, dict[str, Path]] = {}
    for file in path.iterdir():
        if file.name.startswith(".") or not file.is_file():
            continue
        if file.name.endswith(_STATS):
            files.setdefault(file.name.removesuffix(_STATS), {})["stats"] = file
        elif file.suffix in (".tar", ".parquet") and file.stem != "manifest":
            files.setdefault(file.stem, {})[file.suffix[1:]] = file
    shards = tuple(DownloadedShard(name, **kinds) for name, kinds in sorted(files.items()))
    if not any(shard.tar or shard.parquet for shard in shards):
        raise AuditError(
            f"--download {path}: holds neither .tar nor .parquet. Give the folder of the shards themselves."
        )
    return shards


def _of_manifest(path: Path) -> tuple[DownloadedShard, ...]:
    try:
        entries = Manifest.load(path).shards
    except (ManifestError, OSError) as error:
        raise AuditError(f"--download {path}: {error}") from error
    shards = []
    for entry in entries:
        tar = Path(entry.path)
        if not tar.is_file():
            raise AuditError(f"--download {path}: {tar} is not there. Give a folder, or index what is there anew.")
        beside = {"parquet": tar.with_suffix(".parquet"), "stats": tar.with_name(tar.stem + _STATS)}
        shards.append(DownloadedShard(tar.stem, tar, **{kind: file for kind, file in beside.items() if file.is_file()}))
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        # Sets joined from several folders: the folder tells their shards apart.
        shards = [DownloadedShard(str(s.tar.parent / s.name), s.tar, s.parquet, s.stats) for s in shards if s.tar]
    return tuple(shards)
