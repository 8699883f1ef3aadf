"""What stops a reshard, told to the user in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReshardError(ValueError):
    """Arguments, a pool, a request or an output folder that cannot be used; the message names it and the remedy."""


class UsageError(ReshardError):
    """Arguments that contradict each other or cannot be understood."""

    exit_status = 2
    """Of the command, also where it is noticed after the arguments were read (a predicate, say)."""


class DiskFullError(ReshardError):
    """The disk, quota or file-size limit is used up; what is complete stays, and the same command goes on."""


@contextmanager
def told_to_user(what: str) -> Iterator[None]:
    """Turn an OSError inside the block into a `ReshardError` that says `what` was being done."""
    try:
        yield
    except OSError as error:
        raise from_os_error(what, error) from error


def from_os_error(what: str, error: OSError) -> ReshardError:
    """The error to show for `error`, met in doing `what`."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in _DISK_FULL:
        return DiskFullError(
            f"{what}:{where} {error.strerror}. Complete shards are kept: make room and run the same command again, it "
            "goes on."
        )
    return ReshardError(f"{what}:{where} {error.strerror}. Mend that and run the same command again: it goes on.")
