"""Remote shards on a local disk: fetched whole, because a window of samples is read in another order than it lies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from neuclip_scale.config import DataConfig
from neuclip_scale.data.shards import storage

_STALE = 6 * 3600
"""Seconds after which a file that is being fetched belongs to a process that is gone."""

_SHARD = re.compile(r"[0-9a-f]{32}\.tar")
_COMING = re.compile(r"\.[0-9a-f]{32}\.tar\.\d+\.\d+\.tmp|\.now-[a-z0-9_]{8}")
"""Names that are given here. Whatever else is in the folder, which a person chose, belongs to others and stays."""


def default_folder() -> Path:
    """`$NEUCLIP_CACHE`, else a folder of this user among the temporary files."""
    named = os.environ.get("NEUCLIP_CACHE")
    return Path(named).expanduser() if named else Path(tempfile.gettempdir()) / f"neuclip-cache-{os.getuid()}"


def cache_of(section: DataConfig) -> ShardCache:
    """The cache that a recipe's `data` section asks for; nothing is made before a shard is fetched."""
    folder = Path(section.cache_dir) if section.cache_dir else default_folder()
    return ShardCache(folder, int(section.cache_gib * 2**30))


class ShardCache:
    """A folder of fetched shards, shared by all processes of a machine without locks.

    A file has its name only when it is whole; two processes that want one shard at once fetch it twice. The shards
    used longest ago go first; who still reads one keeps it through its open file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._coming: dict[str, threading.Lock] = {}
        self._coming_lock = threading.Lock()

    def local(self, address: str, version: str, *, anew: bool = False) -> str:
        """Path at which the shard can be read now; raises `StorageError`, OSError.

        `version` tells one content of the address from another: a changed shard is fetched anew. Where none is told,
        only `anew` brings what the address holds today.
        """
        if not storage.is_remote(address):
            return address
        # Nothing of an address becomes a path.
        name = hashlib.blake2b(f"{address}\n{version}".encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.tar"
        with self._coming_lock:
            coming = self._coming.setdefault(name, threading.Lock())
        with coming:  # of this process's threads one fetches, the others wait for it
            self._ensure(address, path, anew)
        return str(path)

    @contextlib.contextmanager
    def fetched_now(self, address: str, suffix: str = ".tar") -> Iterator[str]:
        """Path of what the address holds now, whatever is kept of it; a remote one's is gone afterwards."""
        if not storage.is_remote(address):
            yield address
            return
        self.prepare()
        with tempfile.TemporaryDirectory(prefix=".now-", dir=self.folder) as folder:
            target = Path(folder, f"fetched{suffix}")
            storage.fetch(address, target)
            yield str(target)

    def prepare(self) -> None:
        """Make the folder; raises `StorageError` where it belongs to somebody else, who could put other data there."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.folder.stat().st_uid != os.getuid():
            raise storage.StorageError(f"cache {self.folder} belongs to another user. Set data.cache_dir to your own.")

    def _ensure(self, address: str, path: Path, anew: bool) -> None:
        with contextlib.suppress(OSError):
            os.utime(path)  # the newest in use
            if not anew:
                return
        self.prepare()
        partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
        storage.fetch(address, partial)
        os.replace(partial, path)
        self._make_room(path)

    def _make_room(self, kept: Path) -> None:
        total, now = 0, time.time()
        for path, status in sorted(self._files(), key=lambda each: each[1].st_mtime, reverse=True):
            if _COMING.fullmatch(path.name):
                if now - status.st_mtime > _STALE:
                    _remove(path, status)
                continue
            total += status.st_size
            if total > self.max_bytes and path != kept:
                path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for entry in os.scandir(self.folder):
            if not (_SHARD.fullmatch(entry.name) or _COMING.fullmatch(entry.name)):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process made room
                found.append((Path(entry.path), entry.stat()))
        return found


def _remove(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it
    else:
        path.unlink(missing_ok=True)
