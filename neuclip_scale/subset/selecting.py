"""From a request to a sorted .npy of uids: cuts over the whole pool, slices judged in processes, lists merged."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace

from neuclip_scale.files import write_json, write_text
from neuclip_scale.queries.engines import Engine
from neuclip_scale.queries.errors import QueryError
from neuclip_scale.reshard.workers import ordered, worker_pool
from neuclip_scale.subset.clusters import cluster_finder, wanted_clusters
from neuclip_scale.subset.cuts import Cut, find_cut
from neuclip_scale.subset.digests import digest_of_values, filters_digest, selection_digest, settings_of
from neuclip_scale.subset.entities import finder
from neuclip_scale.subset.errors import SubsetError
from neuclip_scale.subset.filters import BasicFilter, ClipScoreFilter, EnglishFilter, Filter, ImageFilter, TextFilter
from neuclip_scale.subset.judging import JudgedSlice, JudgeJob
from neuclip_scale.subset.language import is_language, load_model, model_path
from neuclip_scale.subset.merging import digest_of, merge
from neuclip_scale.subset.outcome import FilterOutcome, Subset, Unreadable, read_report
from neuclip_scale.subset.pool import MetadataFile, OpenedFile, Slice, fetch_copy, find_files, open_files, slices_of
from neuclip_scale.subset.reading import whole_columns
from neuclip_scale.subset.request import SubsetRequest

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done of it, and the whole."""

_LISTED = 100


def select_subset(request: SubsetRequest, progress: Progress | None = None) -> Subset:
    """Write the uids of the rows that pass every filter, and a report beside them.

    A result that is complete, of the same filters and the same pool, is kept. Raises `SubsetError`, queries'
    `QueryError`, `ReshardError` when a worker is killed, and OSError when nothing can be written.
    """
    request.check()
    for kept in (finder, cluster_finder, load_model):
        kept.cache_clear()  # files may have changed since this process last read them
    return _Selection(request, progress or (lambda stage, done, whole: None)).run()


class _Selection:
    """One selection, and what was found so far."""

    def __init__(self, request: SubsetRequest, progress: Progress) -> None:
        self._request, self._progress = request, progress
        self._began = time.perf_counter()
        self._filters = tuple(sorted(request.filters, key=_cost))
        self._model = next(
            (model_path(each.model) for each in self._filters if isinstance(each, EnglishFilter) and not each.column),
            None,
        )
        self._work = request.output.with_name(f".{request.output.name}.work")
        self._unreadable: list[Unreadable] = []

    def run(self) -> Subset:
        request = self._request
        files = find_files(request.metadata, self._work / "copies", request.needs_embeddings)
        filters = filters_digest(self._filters, self._model)
        digest = selection_digest(filters, request.columns, files)
        there = read_report(request.report, request.output)
        if there and there.digest == digest and not there.status and digest_of(request.output) == there.uids_digest:
            return replace(there, seconds=time.perf_counter() - self._began)
        with worker_pool(request.num_workers) as pool:
            opened = self._open(files, pool)
            cuts = self._cuts(opened, pool, digest)
            job = self._job(cuts, digest_of_values([digest, {name: asdict(cut) for name, cut in cuts.items()}]))
            slices, judged = self._judge(opened, job, pool)
        self._progress("joining lists", 0, 0)
        merged = merge([job.part_file(part) for part in slices], request.output)
        subset = Subset(
            path=request.output,
            num_rows=sum(each.num_rows for each in judged),
            num_uids=merged.num_uids,
            num_repeated=merged.num_repeated,
            filters=tuple(self._outcome(each, judged, cuts) for each in self._filters),
            unreadable=tuple(self._unreadable),
            num_unusable=sum(each.num_unusable for each in judged),
            unusable=_unusable(slices, judged),
            digest=digest,
            filters_digest=filters,
            uids_digest=merged.digest,
            seconds=time.perf_counter() - self._began,
        )
        write_json(request.report, subset.document())
        shutil.rmtree(self._work, ignore_errors=True)
        return subset

    def _open(self, files: Sequence[MetadataFile], pool: ProcessPoolExecutor | None) -> list[OpenedFile]:
        """Files that can be used; the others are listed."""
        usable: list[MetadataFile] = []
        for file, fault in zip(files, ordered(pool, fetch_copy, files, 4 * self._request.num_workers), strict=True):
            if file.copy is not None:
                self._progress("fetching metadata", len(usable), len(files))
            if fault:
                self._unreadable.append(Unreadable(file.name, fault))
            else:
                usable.append(file)
        if not usable:
            raise SubsetError(f"--metadata-dir: no file can be used. {files[0].name}: {self._unreadable[0].fault}")
        return open_files(
            usable,
            self._request.columns_read,
            lambda file, fault: self._unreadable.append(Unreadable(file.name, fault)),
        )

    def _cuts(self, opened: list[OpenedFile], pool: ProcessPoolExecutor | None, digest: str) -> dict[str, Cut]:
        """What the fractions come to over the whole pool; a file that breaks the query is taken out of `opened`."""
        wanted = [each for each in self._filters if isinstance(each, ClipScoreFilter) and each.fraction is not None]
        if not wanted or not opened:
            return {}
        asked = digest_of_values([digest, [each.file.name for each in opened]])
        record = self._work / f"cuts-{asked}.json"
        if record.exists():
            return {name: Cut(**cut) for name, cut in json.loads(record.read_bytes()).items()}
        self._progress("finding the scores of the top fraction", 0, 0)
        try:
            cuts = self._ask(wanted, opened)
        except QueryError:
            if not self._take_out_broken(wanted, opened, pool):
                raise
            return self._cuts(opened, pool, digest)
        write_text(record, json.dumps({name: asdict(cut) for name, cut in cuts.items()}))
        return cuts

    def _ask(self, wanted: Sequence[ClipScoreFilter], opened: Sequence[OpenedFile]) -> dict[str, Cut]:
        with Engine(self._request.engine, self._work) as engine:
            paths = [each.file.local for each in opened if each.num_rows] or [opened[0].file.local]
            return {each.name: find_cut(engine, paths, each, self._request.columns) for each in wanted}

    def _take_out_broken(
        self, wanted: Sequence[ClipScoreFilter], opened: list[OpenedFile], pool: ProcessPoolExecutor | None
    ) -> bool:
        """Read what the query read, file by file; returns whether a file was taken out."""
        names = (self._request.columns.uid_column, *(self._request.columns.score(each.arch) for each in wanted))
        before = list(opened)
        asked = [(each.file.local, names) for each in before]
        for each, fault in zip(before, ordered(pool, whole_columns, asked, 4 * self._request.num_workers), strict=True):
            if fault:
                opened.remove(each)
                self._unreadable.append(Unreadable(each.file.name, fault, each.num_rows))
        return len(opened) < len(before)

    def _job(self, cuts: dict[str, Cut], digest: str) -> JudgeJob:
        """What the processes do; models are loaded here first, so that a bad one is told before any work."""
        clusters: tuple[int, ...] = ()
        for each in self._filters:
            if isinstance(each, TextFilter):
                finder(each)
            if isinstance(each, EnglishFilter) and self._model:
                is_language([], self._model, each.language)
            if isinstance(each, ImageFilter):
                clusters = tuple(wanted_clusters(each).tolist())
        for stale in self._work.glob("parts-*"):
            if stale.name != f"parts-{digest}":
                shutil.rmtree(stale, ignore_errors=True)
        folder = self._work / f"parts-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return JudgeJob(
            filters=self._filters,
            columns=self._request.columns,
            names=tuple(self._request.columns_read),
            cuts=cuts,
            model=self._model,
            clusters=clusters,
            folder=folder,
            is_alone=self._request.num_workers == 1,
        )

    def _judge(
        self, opened: Sequence[OpenedFile], job: JudgeJob, pool: ProcessPoolExecutor | None
    ) -> tuple[list[Slice], list[JudgedSlice]]:
        slices = slices_of(opened, self._request.needs_embeddings)
        judged: list[JudgedSlice] = []
        for part, found in zip(slices, ordered(pool, job, slices, 4 * self._request.num_workers), strict=True):
            judged.append(found)
            if found.fault:
                self._unreadable.append(Unreadable(part.file.name, found.fault, part.num_rows))
            self._progress("filtering", len(judged), len(slices))
        return slices, judged

    def _outcome(self, each: Filter, judged: Sequence[JudgedSlice], cuts: dict[str, Cut]) -> FilterOutcome:
        asked, passed = (sum(part.get(each.name, 0) for part in parts) for parts in _counts(judged))
        return FilterOutcome(each.name, settings_of(each), asked, passed, cuts.get(each.name))


def _counts(judged: Sequence[JudgedSlice]) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    return [part.asked for part in judged], [part.passed for part in judged]


def _unusable(slices: Sequence[Slice], judged: Sequence[JudgedSlice]) -> tuple[dict[str, object], ...]:
    rows = [
        {"file": part.file.name, **row} for part, found in zip(slices, judged, strict=True) for row in found.unusable
    ]
    return tuple(rows[:_LISTED])


def _cost(each: Filter) -> int:
    """Numbers before texts, tables of words before models; equal ones stay as they were given."""
    match each:
        case ClipScoreFilter():
            return 0
        case BasicFilter():
            return 1
        case ImageFilter():
            return 5
        case TextFilter():
            return 3
        case EnglishFilter(column=""):
            return 4
    return 2
