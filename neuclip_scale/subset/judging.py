"""One slice of the pool: its rows asked filter by filter, the cheap ones first, and the uids of those that pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from neuclip_scale.data.shards.storage import StorageError
from neuclip_scale.files import atomic_file, write_text
from neuclip_scale.reshard.uids import parse_uids
from neuclip_scale.subset.clusters import cluster_finder
from neuclip_scale.subset.conditions import passes_basic, passes_caption, passes_language_column, passes_score
from neuclip_scale.subset.cuts import Cut
from neuclip_scale.subset.embeddings import EmbeddingRows, open_embeddings
from neuclip_scale.subset.entities import finder
from neuclip_scale.subset.errors import DamagedFileError
from neuclip_scale.subset.filters import (
    BasicFilter,
    CaptionFilter,
    ClipScoreFilter,
    EnglishFilter,
    Filter,
    ImageFilter,
    TextFilter,
)
from neuclip_scale.subset.language import is_language
from neuclip_scale.subset.merging import sorted_rows
from neuclip_scale.subset.pool import Slice
from neuclip_scale.subset.request import Columns
from neuclip_scale.subset.rows import Rows

_ROWS_AT_ONCE = 1 << 16
_LISTED = 20
"""Rows of a slice that are named when they cannot be used."""

Judge = Callable[[Rows], np.ndarray]
"""[n] bool of n rows."""


@dataclass
class JudgedSlice:
    """What was found in one slice."""

    num_rows: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    """Rows that each filter was asked about: those that passed all before it."""
    passed: dict[str, int] = field(default_factory=dict)
    num_unusable: int = 0
    """Rows without a uid, and rows whose embedding is not finite."""
    unusable: list[dict[str, object]] = field(default_factory=list)
    """The first of them: row and reason."""
    fault: str = ""
    """Why nothing of the slice is used; empty when it could be read."""

    def leave_out(self, places: np.ndarray, reason: str) -> None:
        """Count rows that cannot be used."""
        self.num_unusable += len(places)
        room = max(0, _LISTED - len(self.unusable))
        self.unusable += [{"row": int(place), "reason": reason} for place in places[:room]]


@dataclass(frozen=True)
class JudgeJob:
    """Judges slices, each in any process; what is complete is kept in `folder`, and taken over the next time."""

    filters: tuple[Filter, ...]
    """In the order in which rows are asked."""
    columns: Columns
    names: tuple[str, ...]
    """Columns to read."""
    cuts: dict[str, Cut]
    """By the filter's name, for those with a fraction."""
    model: Path | None
    """Of languages."""
    clusters: tuple[int, ...]
    """Numbers of the wanted ones."""
    folder: Path
    is_alone: bool
    """Whether no other process judges."""

    def __call__(self, part: Slice) -> JudgedSlice:
        """Judge one slice; raises `SubsetError` and OSError when that is not the slice's fault."""
        record = self.folder / f"{part.name}.json"
        if record.exists():
            return JudgedSlice(**json.loads(record.read_bytes()))
        found = JudgedSlice()
        try:
            with ExitStack() as stack:
                kept = [self._uids(rows, found) for rows in self._narrowed(part, found, stack)]
            rows = sorted_rows(kept)
        except (DamagedFileError, StorageError) as error:
            found, rows = JudgedSlice(fault=str(error)), sorted_rows([])
        with atomic_file(self.part_file(part)) as stream:
            stream.write(rows.tobytes())
        write_text(record, json.dumps(asdict(found)))
        return found

    def part_file(self, part: Slice) -> Path:
        """Where the slice's uids go: sorted pairs of 64-bit numbers, each as often as it was kept."""
        return self.folder / f"{part.name}.uids"

    def _narrowed(self, part: Slice, found: JudgedSlice, stack: ExitStack) -> Iterator[Rows]:
        """The rows of each batch that pass every filter."""
        embeddings = None
        if any(isinstance(each, ImageFilter) for each in self.filters):
            embeddings = self._open_embeddings(part, stack)
        judges = [(each.name, self._judge(each, embeddings, found)) for each in self.filters]
        found.asked = {name: 0 for name, _ in judges}
        found.passed = dict(found.asked)
        for rows in _batches(part, self.names):
            found.num_rows += len(rows)
            for name, judge in judges:
                mask = judge(rows) if len(rows) else np.zeros(0, dtype=bool)
                found.asked[name] += len(rows)
                rows = rows.where(mask)
                found.passed[name] += len(rows)
            yield rows
        if found.num_rows != part.num_rows:
            raise DamagedFileError(f"has {found.num_rows} rows, and its footer tells {part.num_rows}")
        if embeddings is not None:
            embeddings.finish()

    def _open_embeddings(self, part: Slice, stack: ExitStack) -> EmbeddingRows:
        each = next(each for each in self.filters if isinstance(each, ImageFilter))
        path = stack.enter_context(part.file.embeddings())
        rows = stack.enter_context(open_embeddings(path, each.embedding, part.rows_of_file))
        width = cluster_finder(each.centroids, each.device, self.is_alone).width
        if rows.shape[1] != width:
            raise DamagedFileError(f".npz: {each.embedding} has rows of {rows.shape[1]}, and the centroids of {width}")
        return rows

    def _judge(self, each: Filter, embeddings: EmbeddingRows | None, found: JudgedSlice) -> Judge:
        columns = self.columns
        match each:
            case BasicFilter():
                return lambda rows: passes_basic(rows, each, columns)
            case CaptionFilter():
                return lambda rows: passes_caption(rows, each, columns)
            case ClipScoreFilter():
                return lambda rows: passes_score(rows, each, columns, self.cuts.get(each.name))
            case EnglishFilter(column=column) if column:
                return lambda rows: passes_language_column(rows, each)
            case EnglishFilter(language=language):
                model = self.model
                assert model is not None, "the request found it"
                return lambda rows: is_language(rows.texts(columns.text_column), model, language)
            case TextFilter():
                return lambda rows: finder(each)(rows.texts(columns.text_column))
        assert embeddings is not None
        return lambda rows: self._in_clusters(rows, each, embeddings, found)

    def _in_clusters(self, rows: Rows, each: ImageFilter, embeddings: EmbeddingRows, found: JudgedSlice) -> np.ndarray:
        clusters = cluster_finder(each.centroids, each.device, self.is_alone)
        numbers = [clusters(features) for _, features in embeddings.blocks(rows.places)]
        cluster = np.concatenate(numbers)
        found.leave_out(rows.places[cluster < 0], "its embedding is not finite")
        return np.isin(cluster, self.clusters)

    def _uids(self, rows: Rows, found: JudgedSlice) -> np.ndarray:
        """[n] u8,u8 of rows that are kept."""
        texts = rows.texts(self.columns.uid_column)
        is_there = np.array([bool(text) for text in texts], dtype=bool)
        found.leave_out(rows.places[~is_there], "it has no uid")
        uids, _ = parse_uids([text for text in texts if text])
        pairs = np.empty((len(uids.high), 2), dtype=np.uint64)
        pairs[:, 0], pairs[:, 1] = uids
        return pairs


def _batches(part: Slice, names: tuple[str, ...]) -> Iterator[Rows]:
    """The slice's rows, some thousand at a time; raises `DamagedFileError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part.file.local) as parquet:
            groups = range(part.groups[0])
            place = sum(parquet.metadata.row_group(group).num_rows for group in groups)
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=list(part.groups), columns=list(names)):
                yield Rows(batch, np.arange(place, place + len(batch)))
                place += len(batch)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(f"cannot be read to its end ({reason})") from error
