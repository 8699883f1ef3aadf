"""The pool's metadata: parquet files, each with an .npz of embeddings beside it, found and opened before any work."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from neuclip_scale.data.shards import storage
from neuclip_scale.data.shards.storage import StorageError
from neuclip_scale.subset.errors import DamagedFileError, SubsetError
from neuclip_scale.untrusted_text import printable

ROWS_OF_A_SLICE = 1 << 21


@dataclass(frozen=True)
class MetadataFile:
    """One parquet of the pool."""

    address: str
    """A path, or the address of a remote file."""
    name: str
    """Below the pool, as reports name it."""
    fingerprint: tuple[str | int, ...]
    """Name, size, and time or version: what changes when it does."""
    copy: Path | None = None
    """Of a remote one, where its copy goes."""

    @property
    def local(self) -> Path:
        """Where it can be read."""
        return self.copy or Path(self.address)

    @property
    def embeddings_address(self) -> str:
        """Path or address of the .npz beside it."""
        if self.copy is None:
            return str(self.local.with_suffix(".npz"))
        place, mark, query = self.address.partition("?")
        return place.removesuffix(".parquet") + ".npz" + mark + query

    @contextmanager
    def embeddings(self) -> Iterator[Path]:
        """The .npz beside it; a copy of a remote one is removed at the end of the block. Raises `StorageError`."""
        if self.copy is None:
            yield Path(self.embeddings_address)
            return
        local = self.copy.with_suffix(".npz")
        try:
            storage.fetch(self.embeddings_address, local)
            yield local
        finally:
            local.unlink(missing_ok=True)


@dataclass(frozen=True)
class OpenedFile:
    """A parquet whose footer was read."""

    file: MetadataFile
    group_rows: tuple[int, ...]
    """Rows of each row group."""
    kinds: dict[str, str]
    """Type of each column that is read."""

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_rows)


@dataclass(frozen=True)
class Slice:
    """Neighbouring row groups of one parquet: what one process works on at a time."""

    file: MetadataFile
    groups: tuple[int, ...]
    num_rows: int
    rows_of_file: int

    @property
    def name(self) -> str:
        """Of the files that are kept of it until the end; the same although other files could not be read before."""
        return hashlib.blake2b(repr((self.file.fingerprint, self.groups)).encode(), digest_size=12).hexdigest()


def find_files(metadata: str, copies: Path, with_embeddings: bool = False) -> list[MetadataFile]:
    """The parquets of the pool in the order of their names; raises `SubsetError` where there is none.

    `with_embeddings`: their fingerprints change with the .npz beside them too.
    """
    try:
        found = _remote(metadata, copies) if storage.is_remote(metadata) else _local(metadata)
    except (OSError, StorageError) as error:
        raise SubsetError(f"--metadata-dir {metadata}: {error}") from error
    if not found:
        raise SubsetError(f"--metadata-dir {metadata}: no .parquet there. Give the folder of the pool's metadata.")
    if not with_embeddings:
        return found
    return [replace(each, fingerprint=each.fingerprint + _embeddings_stamp(each)) for each in found]


def _local(metadata: str) -> list[MetadataFile]:
    path = Path(metadata)
    if path.is_dir():
        named = [(each.relative_to(path).as_posix(), each) for each in _below(path)]
    else:
        paths = [path] if path.is_file() else map(Path, glob.glob(metadata, recursive=True))
        named = [(str(each), each) for each in paths if each.is_file()]
    return [MetadataFile(str(each), printable(name), _stamp(each, name)) for name, each in sorted(named)]


def _below(folder: Path) -> Iterator[Path]:
    """Parquets in a folder and all below it; behind links too, which `Path.rglob` passes over, each folder once."""
    met: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in met:
            folders.clear()
            continue
        met.add(os.path.realpath(place))
        folders.sort()
        found = (Path(place, name) for name in names if name.endswith(".parquet") and not name.startswith("."))
        yield from (each for each in found if each.is_file())


def _stamp(path: Path, name: str) -> tuple[str | int, ...]:
    status = path.stat()
    return name, status.st_size, status.st_mtime_ns


def _embeddings_stamp(file: MetadataFile) -> tuple[str | int, ...]:
    """Nothing for an .npz that is not there: reading it tells that."""
    try:
        if file.copy is None:
            return _stamp(Path(file.embeddings_address), "npz")
        facts = storage.facts(file.embeddings_address)
        return "npz", facts.num_bytes, facts.version
    except (OSError, StorageError):
        return ()


def _remote(metadata: str, copies: Path) -> list[MetadataFile]:
    place, mark, query = metadata.partition("?")
    if "*" in place:
        found = storage.remote_matches(metadata)
    elif place.endswith(".parquet"):
        found = [metadata]
    else:
        found = storage.remote_matches(f"{place.rstrip('/')}/*.parquet{mark}{query}")
    return [_remote_file(address, copies) for address in sorted(found)]


def _remote_file(address: str, copies: Path) -> MetadataFile:
    facts, name = storage.facts(address), address.partition("?")[0]
    fingerprint = name, facts.num_bytes, facts.version
    stem = hashlib.blake2b(repr(fingerprint).encode(), digest_size=12).hexdigest()
    return MetadataFile(address, name, fingerprint, copies / f"{stem}.parquet")


def fetch_copy(file: MetadataFile) -> str:
    """Bring the copy of a remote parquet, unless it is there; returns what went wrong, or an empty text."""
    if file.copy is None or file.copy.exists():
        return ""
    partial = file.copy.with_suffix(".tmp")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        storage.fetch(file.address, partial)
        partial.rename(file.copy)
    except (OSError, StorageError) as error:
        return str(error)
    return ""


def open_files(
    files: Iterable[MetadataFile], wanted: dict[str, bool], told: Callable[[MetadataFile, str], None]
) -> list[OpenedFile]:
    """Read the footers; `told` hears of each file that cannot be used and why.

    Raises `SubsetError` when none has the `wanted` columns, of texts or (where true) of numbers.
    """
    opened: list[OpenedFile] = []
    faults = []
    for file in files:
        try:
            found = _open(file.local, file, wanted)
            if opened and found.kinds != opened[0].kinds:
                odd = next(name for name, kind in found.kinds.items() if kind != opened[0].kinds[name])
                raise DamagedFileError(
                    f"column {odd} is {found.kinds[odd]}, but {opened[0].kinds[odd]} in {opened[0].file.name}"
                )
            opened.append(found)
        except DamagedFileError as error:
            faults.append(f"{file.name}: {error}")
            told(file, str(error))
    if faults and not opened:
        raise SubsetError(f"--metadata-dir: no file can be used. {faults[0]}. See the options that end in -column.")
    return opened


def _open(path: Path, file: MetadataFile, wanted: dict[str, bool]) -> OpenedFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError, UnicodeEncodeError) as error:  # of a name that is not UTF-8
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(f"no whole parquet file ({reason})") from error
    if any(count < 0 for count in rows):
        raise DamagedFileError("its footer tells a negative number of rows")
    for name, is_number in wanted.items():
        if schema.names.count(name) != 1:
            raise DamagedFileError(f"has no column {name}, but {', '.join(schema.names[:20])}")
        if not _fits(schema.field(name).type, is_number):
            kind = "numbers" if is_number else "texts"
            raise DamagedFileError(f"column {name} is {schema.field(name).type}, and must be of {kind}")
    return OpenedFile(file, rows, {name: str(schema.field(name).type) for name in wanted})


def _fits(kind: object, is_number: bool) -> bool:
    import pyarrow as pa

    if is_number:
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if pa.types.is_dictionary(kind):
        return _fits(kind.value_type, False)  # type: ignore[attr-defined]
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def slices_of(opened: Iterable[OpenedFile], whole: bool) -> list[Slice]:
    """The work of one process at a time: some row groups, or where `whole` the file, as embeddings are read forward."""
    found: list[Slice] = []
    for each in opened:
        groups: list[int] = []
        rows = 0
        for group, count in enumerate(each.group_rows):
            if groups and not whole and rows + count > ROWS_OF_A_SLICE:
                found.append(Slice(each.file, tuple(groups), rows, each.num_rows))
                groups, rows = [], 0
            groups.append(group)
            rows += count
        if groups:
            found.append(Slice(each.file, tuple(groups), rows, each.num_rows))
    return found
