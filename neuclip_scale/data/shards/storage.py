"""Where shards lie: local files, object stores, web servers, and commands (`pipe:`) that write a shard to their output.

s3:// and gs:// go through pyarrow, which needs nothing more; every other protocol through fsspec.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from neuclip_scale.data.shards.names import ShardError

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_DELAY = 1.0
"""Seconds before the second attempt; each further one waits twice as long, half a minute in all."""

_PIPE = "pipe:"
_CHUNK = 4 << 20
_ARROW = ("s3", "gs", "gcs")

T = TypeVar("T")


class StorageError(ShardError):
    """A shard that could not be found or fetched; the message names it and what was tried."""


@dataclass(frozen=True)
class Facts:
    """What a store says of a shard without reading it."""

    num_bytes: int
    version: str
    """ETag or time of change; empty where the store tells none."""


def is_pipe(address: str) -> bool:
    """Whether the address is a command whose output is the shard."""
    return address.startswith(_PIPE)


def is_remote(address: str) -> bool:
    """Whether the shard must be fetched before it can be read at random places."""
    return is_pipe(address) or "://" in address


def base_name(address: str) -> str:
    """`00000.tar` of any address: what names a shard wherever a copy of it lies."""
    if is_pipe(address):
        names = re.findall(r"[^/\s'\"]+\.tar\b", address)
        return str(names[-1]) if names else address
    return Path(address.partition("?")[0] if is_remote(address) else address).name


def facts(address: str) -> Facts:
    """Size and version of a remote shard; raises `StorageError`, also for `pipe:`, which must be run to know."""
    if is_pipe(address):
        raise StorageError(f"shard {address!r}: the size of a command's output is not known before it has run.")

    def ask() -> Facts:
        system, path = _filesystem(address)
        info = system.info(path)
        if info.get("size") is None:
            raise StorageError(f"shard {address!r}: the server tells no size. Fetch the shards, or use pipe:curl.")
        version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified") if info.get(key)), "")
        return Facts(int(info["size"]), str(version))

    return retried(ask, address)


def remote_matches(address: str) -> list[str]:
    """Addresses that a remote folder (its `*.tar`) or glob stands for; raises `StorageError`."""
    protocol, _, rest = address.partition("://")
    rest, mark, query = rest.partition("?") if protocol in _ARROW else (rest, "", "")

    def find() -> list[str]:
        system, path = _filesystem(address)
        pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
        return [found if "://" in found else f"{protocol}://{found}" for found in system.glob(pattern)]

    return sorted(found + mark + query for found in retried(find, address))


def read_small(address: str, max_bytes: int) -> bytes:
    """A file beside the shards; raises OSError where there is none, `StorageError` for one above `max_bytes`.

    Asked once: what is beside the shards only saves time.
    """
    if not is_remote(address):
        with open(address, "rb") as stream:
            data = stream.read(max_bytes + 1)
    else:
        system, path = _filesystem(address)
        try:
            with system.open(path, "rb") as stream:
                data = stream.read(max_bytes + 1)
        except _passing() as error:
            raise StorageError(f"{address!r}: {error}") from error
    if len(data) > max_bytes:
        raise StorageError(f"{address!r} has more than {max_bytes} bytes, too many for a list of shards.")
    return bytes(data)


def fetch(address: str, target: Path) -> None:
    """Copy a shard to `target`, going on where a broken connection stopped; raises `StorageError`.

    It is on the disk when this returns: renamed before, it could be empty under its own name after a power cut.
    """
    target.unlink(missing_ok=True)
    try:
        with open(target, "ab") as file:
            retried(lambda: _run(address, file) if is_pipe(address) else _copy(address, file), address)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def retried(action: Callable[[], T], address: str) -> T:
    """The result of `action`, tried again with growing pauses while its failure may pass; raises `StorageError`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except _passing() as error:
            if isinstance(error, (FileNotFoundError, PermissionError)) and not _is_overload(error.__cause__):
                raise StorageError(f"shard {address!r}: {error}. Check the address and the credentials.") from error
            text = str(error.__cause__ or error) or type(error).__name__
            if attempt == ATTEMPTS or _is_local_fault(error):
                raise StorageError(f"shard {address!r}: given up after {attempt} attempt(s): {text}") from error
            delay = FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            logger.warning(
                "shard %s: %s; attempt %d of %d in %.1f s", address, text.split("\n")[0], attempt + 1, ATTEMPTS, delay
            )
            time.sleep(delay)
    raise AssertionError("unreachable")


def _copy(address: str, file: IO[bytes]) -> None:
    system, path = _filesystem(address)
    size = system.info(path).get("size")
    with system.open(path, "rb") as source:
        # A server without ranges gives an object that cannot seek: begin again.
        if file.tell() and source.seekable():
            source.seek(file.tell())
        else:
            file.seek(0)
            file.truncate()
        while block := source.read(_CHUNK):
            file.write(block)
    if size is not None and file.tell() != size:
        raise ConnectionError(f"{file.tell()} of {size} bytes came")


def _run(address: str, file: IO[bytes]) -> None:
    """A command begins anew at each attempt."""
    file.truncate(0)
    done = subprocess.run(
        ["/bin/sh", "-c", address.removeprefix(_PIPE)], stdout=file, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise ConnectionError(f"the command ended with status {done.returncode}: {said}")
    file.seek(0, os.SEEK_END)


def _filesystem(address: str) -> tuple[Any, str]:
    protocol = address.partition("://")[0]
    if protocol in _ARROW:
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        system, path = FileSystem.from_uri(address)
        return ArrowFSWrapper(system), path
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise StorageError(f"shard {address!r}: {error}. For http(s): pip install 'neuclip-scale[http]'.") from error


def _passing() -> tuple[type[BaseException], ...]:
    """Errors after which another attempt may do."""
    try:
        from aiohttp import ClientError
    except ImportError:
        return OSError, asyncio.TimeoutError
    return OSError, asyncio.TimeoutError, ClientError


def _is_overload(cause: BaseException | None) -> bool:
    """fsspec calls every refusal of a web server "not found"; its cause tells one that may pass."""
    status = getattr(cause, "status", None)
    return (status in (408, 429) or status >= 500) if isinstance(status, int) else isinstance(cause, _passing())


def _is_local_fault(error: BaseException) -> bool:
    """A full disk here is not mended by asking there once more."""
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
