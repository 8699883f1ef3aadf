"""What a download consists of: for each of its shards a tar, a parquet and a `_stats.json`, or some of these."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from neuclip_scale.audit.errors import AuditError, UsageError
from neuclip_scale.data.manifest import Manifest, ManifestError
from neuclip_scale.data.shards import storage
from neuclip_scale.untrusted_text import printable

MAX_STATS_BYTES = 16 << 20
_STATS = "_stats.json"


File = Path | str
"""A local file, or the address of a remote one."""


def fingerprint_of(file: File) -> list[object]:
    """Name, size, and times or version of a file: what changes when it does. Raises OSError, `StorageError`.

    The second time changes with the rights too, on which it hangs whether the file could be read.
    """
    if isinstance(file, str):
        facts = storage.facts(file)
        return [file, facts.num_bytes, facts.version]
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@dataclass(frozen=True)
class DownloadedShard:
    """The files of one shard; None for one that is not there."""

    name: str
    """`00000`, what the files' names have in common; printable."""
    tar: File | None = None
    parquet: File | None = None
    stats: File | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when a file does."""
        found = [None if file is None else fingerprint_of(file) for file in (self.tar, self.parquet, self.stats)]
        return hashlib.blake2b(json.dumps(found).encode(), digest_size=6).hexdigest()

    @contextmanager
    def on_disk(self, folder: Path) -> Iterator[DownloadedShard]:
        """The same with every remote file as a copy in `folder`, which is removed at the end of the block.

        Raises `StorageError` for what cannot be fetched.
        """
        files = {"tar": self.tar, "parquet": self.parquet, "stats": self.stats}
        if not any(isinstance(file, str) for file in files.values()):
            yield self
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            for kind, file in files.items():
                if isinstance(file, str):
                    copy = Path(name) / storage.base_name(file)
                    storage.fetch(file, copy)
                    files[kind] = copy
            yield DownloadedShard(self.name, **files)


@dataclass(frozen=True)
class Download:
    """A folder that img2dataset or `neuclip reshard` wrote, or the shards that a manifest names."""

    name: str
    """How the report calls it."""
    path: File
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
    remote = storage.is_remote(rest)
    path = Path(rest)
    base = (
        rest.partition("?")[0].rstrip("/").rpartition("/")[2]
        if remote
        else path.stem
        if path.is_file()
        else path.resolve().name
    )
    name = name or _slug(base)
    if name != _slug(name):
        raise UsageError(f"--download {text!r}: the name may have letters, digits, - and single _.")
    if name in taken:
        if mark and "/" not in text.partition("=")[0]:
            raise UsageError(f"--download {text!r}: the name {name} was given twice.")
        name = next(f"{name}-{number}" for number in range(2, 1000) if f"{name}-{number}" not in taken)
    if remote:
        return Download(name, rest, _of_address(rest))
    return Download(name, path, _of_manifest(path) if path.is_file() else _of_folder(path))


def _slug(text: str) -> str:
    """Letters, digits, - and single _: two of these stand between names in the names of lists."""
    slug = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in text)
    return re.sub("_{2,}", "_", slug) or "download"


def _of_folder(path: Path) -> tuple[DownloadedShard, ...]:
    if not path.is_dir():
        raise AuditError(
            f"--download {path}: there is no such folder. Give one that img2dataset or `neuclip reshard` wrote."
        )
    return _grouped({file.name: file for file in path.iterdir() if file.is_file()}, path)


def _of_address(address: str) -> tuple[DownloadedShard, ...]:
    try:
        found = storage.remote_matches(below(address, "*"))
    except storage.StorageError as error:
        raise AuditError(f"--download {address}: {error}") from error
    return _grouped({storage.base_name(each): each for each in found}, address)


def below(address: str, pattern: str) -> str:
    """`pattern` in the remote folder `address`, whose query (of an S3 server, say) stays at the end."""
    place, mark, query = address.partition("?")
    return f"{place.rstrip('/')}/{pattern}{mark}{query}"


def _grouped(named: Mapping[str, File], folder: File) -> tuple[DownloadedShard, ...]:
    """Files by their shards."""
    files: dict[str, dict[str, File]] = {}
    for name, file in named.items():
        stem, _, extension = name.rpartition(".")
        if name.startswith("."):
            continue
        if name.endswith(_STATS):
            files.setdefault(name.removesuffix(_STATS), {})["stats"] = file
        elif extension in ("tar", "parquet") and stem != "manifest":
            files.setdefault(stem, {})[extension] = file
    shards = tuple(DownloadedShard(printable(name), **kinds) for name, kinds in sorted(files.items()))
    if not any(shard.tar or shard.parquet for shard in shards):
        raise AuditError(
            f"--download {folder}: holds neither .tar nor .parquet. Give the folder of the shards themselves."
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
        there = {kind: file for kind, file in beside.items() if file.is_file()}
        shards.append(DownloadedShard(printable(tar.stem), tar, **there))
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        # Sets joined from several folders: the folder tells their shards apart.
        shards = [replace(shard, name=printable(str(Path(str(shard.tar)).with_suffix("")))) for shard in shards]
    return tuple(shards)
