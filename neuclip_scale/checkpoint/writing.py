"""Saving a checkpoint so that a kill, a full disk or a failing rank costs at most the one being written."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar, cast

import torch

from neuclip_scale.checkpoint.layout import (
    CHECKSUMS_FILE,
    FORMAT,
    LATEST_FILE,
    SHARED_FILE,
    CheckpointError,
    checkpoints_by_step,
    measure,
    rank_file,
    step_folder,
)
from neuclip_scale.distributed import gather_objects, is_main, rank, world_size
from neuclip_scale.files import sync_folder, write_json, write_text

log = logging.getLogger(__name__)

T = TypeVar("T")


def save_checkpoint(
    folder: Path, step: int, shared: Mapping[str, Any], per_rank: Mapping[str, Any], *, keep: int, keep_every: int = 0
) -> Path:
    """Write checkpoint `step` into `folder`, delete all but the newest `keep`, return its path (collective).

    What `start_save` starts, finished at once.
    """
    return start_save(folder, step, shared, per_rank, keep=keep, keep_every=keep_every).finish()


def start_save(
    folder: Path, step: int, shared: Mapping[str, Any], per_rank: Mapping[str, Any], *, keep: int, keep_every: int = 0
) -> PendingSave:
    """Begin to write checkpoint `step` into `folder` behind the caller's back (collective).

    It is one only once `PendingSave.finish` has returned; then all but the newest `keep` and those of steps that
    `keep_every` divides are deleted.

    `shared` matters on rank 0 only, `per_rank` is this rank's own, and no tensor in them may change until then (see
    `snapshot`); `folder` must be seen by every rank. An existing checkpoint of the same step is replaced; later ones
    belong to a continuation that was given up and are renamed to `superseded-step_N`. Raises CheckpointError on every
    rank if any rank failed: the partial checkpoint is then removed and the earlier ones are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: the checkpoint just written must stay. Keep at least 1.")
    target = Path(folder) / step_folder(step)
    _raise_together(target, _attempt(target, _prepare if is_main() else _nothing))
    contents = {rank_file(rank()): per_rank}
    if is_main():
        contents[SHARED_FILE] = shared
    return PendingSave(target, step, contents, keep, keep_every)


class PendingSave:
    """A checkpoint that a thread of each rank is writing."""

    def __init__(
        self, target: Path, step: int, contents: Mapping[str, Mapping[str, Any]], keep: int, keep_every: int
    ) -> None:
        self._target, self._step, self._keep, self._keep_every = target, step, keep, keep_every
        self._outcome: _Outcome[dict[str, Any]] | None = None

        def write(partial: Path) -> dict[str, Any]:
            return {name: _write(partial / name, content) for name, content in contents.items()}

        def run() -> None:
            self._outcome = _attempt(target, write)

        # A daemon: a run that fails meanwhile must not wait for it, and loses this checkpoint as a kill would.
        self._thread = threading.Thread(target=run, name=f"write {target.name}", daemon=True)
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's bytes are on the disk, or have failed to get there (no communication)."""
        return not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for all ranks, give the checkpoint its name, tidy up; returns its path (collective).

        Raises CheckpointError.
        """
        self._thread.join()
        assert self._outcome is not None
        digests = _raise_together(self._target, self._outcome)

        def publish(partial: Path) -> None:
            files = dict(sorted(item for written in digests for item in written.items()))
            checksums = {"format": FORMAT, "step": self._step, "world_size": world_size(), "files": files}
            _publish(partial, self._target, checksums)

        _raise_together(self._target, _attempt(self._target, publish if is_main() else _nothing))
        if is_main():
            _tidy(self._target, self._step, self._keep, self._keep_every)
        return self._target


class _Outcome(NamedTuple, Generic[T]):
    value: T | None
    problem: str
    cause: Exception | None


def _partial(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def _attempt(target: Path, action: Callable[[Path], T]) -> _Outcome[T]:
    """Run `action` on the temporary folder; an error is kept for `_raise_together`."""
    try:
        return _Outcome(action(_partial(target)), "", None)
    except Exception as error:  # raised on this rank alone, the others would wait for it
        return _Outcome(None, f"rank {rank()}: {_explain(error)}", error)


def _raise_together(target: Path, outcome: _Outcome[T]) -> list[T]:
    """All ranks get all ranks' results, or all ranks raise (collective)."""
    outcomes: list[Any] = gather_objects((outcome.value, outcome.problem))
    problems = [text for _, text in outcomes if text]
    if problems:
        if is_main():
            shutil.rmtree(_partial(target), ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {target}: {'; '.join(problems)}") from outcome.cause
    return [value for value, _ in outcomes]


def snapshot(value: Any) -> Any:
    """A copy of `value` on the CPU that stays as it is while training goes on."""
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _nothing(partial: Path) -> None:
    """The part of the other ranks in what rank 0 does alone."""


def _prepare(partial: Path) -> None:
    """Clear away what a killed save left, then create the temporary folder."""
    folder = partial.parent
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".old-step_*"):
        target = old.with_name(old.name.removeprefix(".old-"))
        if not target.exists():  # killed between the two renames of _publish
            os.rename(old, target)
    _remove_leftovers(folder, ".tmp-step_*", ".trash-step_*", ".old-step_*")
    partial.mkdir()


def _write(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write one file to the disk, read it back, and return its size and sha256."""
    content = _plain(content, path.name)
    with open(path, "xb") as raw:
        file = _DigestingFile(raw)
        torch.save(content, cast("IO[bytes]", file))
        if file.error is not None:
            raise file.error
        raw.flush()
        os.fsync(raw.fileno())
        if hasattr(os, "posix_fadvise"):  # else the read below comes from memory and proves nothing about the disk
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = {"size": file.size, "sha256": file.digest.hexdigest()}
    read = measure(path)
    if read != written:
        raise CheckpointError(f"{path.name} reads back as {read}, but {written} was written. Check the disk.")
    return written


class _DigestingFile:
    """What torch.save needs of a file, with a running sha256.

    It keeps the first error instead of raising it: torch.save writes from C++ and would report the exception
    as one about archive offsets.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.digest, self.size = raw, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.raw.write(data)
            except OSError as error:
                self.error = error
            self.digest.update(data)
            self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """The caller flushes once, to the disk."""


def _publish(partial: Path, target: Path, checksums: dict[str, Any]) -> None:
    write_json(partial / CHECKSUMS_FILE, checksums)
    sync_folder(partial)
    if target.exists():
        os.rename(target, target.with_name(f".old-{target.name}"))
    os.rename(partial, target)
    sync_folder(target.parent)


def _tidy(target: Path, step: int, keep: int, keep_every: int) -> None:
    """Set aside or delete what the new checkpoint makes obsolete; it is safe already, so errors only warn."""
    folder = target.parent
    try:
        write_text(folder / LATEST_FILE, f"{target.name}\n")
        by_step = checkpoints_by_step(folder)
        for later in [path for other, path in by_step.items() if other > step]:
            aside = later.with_name(f"superseded-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(later, aside)
            log.warning("%s is of a continuation that was given up; renamed to %s", later, aside.name)
        # Renamed before any file goes: a kill while deleting must not leave a torn step_N.
        for obsolete in sorted(other for other in by_step if other <= step)[:-keep]:
            if keep_every and obsolete % keep_every == 0:
                continue
            os.rename(by_step[obsolete], folder / f".trash-{step_folder(obsolete)}")
        _remove_leftovers(folder, ".trash-step_*", ".old-step_*")
    except OSError as error:
        log.warning("checkpoint %s is saved, but tidying %s failed: %s", target.name, folder, error)


def _remove_leftovers(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)


def _plain(value: Any, where: str) -> Any:
    """Copy the containers in `value`; raises ValueError for what `weights_only=True` would not read back."""
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"{where} has the key {key!r}. Use str or int keys.")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        tensor = value.detach()
        # A view would be saved with all of the tensor it looks at.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    # Exact types: NumPy's float64 is a float by inheritance, and weights_only refuses it at the resume.
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise ValueError(f"{where} is a {kind}. A checkpoint holds tensors, numbers, strings, lists and dicts.")


def _explain(error: Exception) -> str:
    """The error with its remedy, as far as one is known."""
    if not isinstance(error, OSError):
        return str(error) if isinstance(error, (CheckpointError, ValueError)) else repr(error)
    remedies = {
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "Free space; earlier checkpoints are intact.",
        (errno.EROFS, errno.EACCES, errno.EPERM): "Make the folder writable or choose another run_dir.",
        (errno.ENOTDIR, errno.EEXIST): "Something else has that name; choose another run_dir.",
        (errno.ENOENT,): "run_dir must be on a file system that all nodes share.",
    }
    remedy = next((text for codes, text in remedies.items() if error.errno in codes), "")
    return f"{error}. {remedy}".rstrip()
