"""The audit itself: reads the downloads, computes every sample's fate, and from it all parts of the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from neuclip_scale.audit.bias import measure_bias
from neuclip_scale.audit.content import Fetched, compare_looks, examine
from neuclip_scale.audit.errors import AuditError
from neuclip_scale.audit.fates import fates
from neuclip_scale.audit.findings import notes_on
from neuclip_scale.audit.inputs import Inputs, write_subset
from neuclip_scale.audit.membership import DOMAIN, KEPT, TLD, Membership
from neuclip_scale.audit.outages import ShardLoss, outages, shard_losses
from neuclip_scale.audit.pairs import Pair, compare_pair
from neuclip_scale.audit.places import Places, losses_by, losses_in
from neuclip_scale.audit.published import one_row_each
from neuclip_scale.audit.reading import Progress, ReadDownload, decode_pictures, read_download, tell_resolver_failures
from neuclip_scale.audit.reasons import REASONS
from neuclip_scale.audit.request import AuditRequest
from neuclip_scale.audit.trained import TrainedRun
from neuclip_scale.queries.engines import Engine
from neuclip_scale.untrusted_text import printable


class Audit:
    """One audit in progress. Its stages are cached in `OUTPUT/cache`, so that an interrupted one goes on."""

    def __init__(
        self,
        request: AuditRequest,
        inputs: Inputs,
        engine: Engine,
        pool: ProcessPoolExecutor | None,
        progress: Progress,
    ) -> None:
        self.request = request
        self.inputs = inputs
        self.engine = engine
        self.seconds: dict[str, float] = {}
        self._cache = request.output / "cache"
        self._progress = progress
        self._lists: dict[str, Any] = {}
        self._published = inputs.published.table(engine, inputs.identity)
        self.reads = self._read(pool)
        told = [read.tells_all_attempts for read in self.reads]
        self.membership = Membership(engine.parquet([self._fates()]), inputs, request.subset_file is not None, told)
        self._counts = [self.membership.counts(engine, i) for i in range(len(inputs.downloads))]
        self._nameless = self._rows_without_uid(self._published)
        if self._counts[0]["listed_more_than_once"]:
            self._published = one_row_each(self._published)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and note the seconds of the block."""
        self._progress(name, 0, 0)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def download_part(self, i: int) -> dict[str, Any]:
        """What the document says of download i."""
        read = self.reads[i]
        with self.stage("reasons"):
            reasons = self._reasons(i)
            losses = [] if read.attempts is None else shard_losses(self.engine, read.attempts)
        judged = self._judged(i)
        with self.stage("places"):
            places = self._places(i, judged, losses)
        with self.stage("bias"), self.engine.told():  # it asks the table's engine itself
            bias = measure_bias(judged.drop("url", DOMAIN) if DOMAIN in judged.columns else judged, KEPT)
        return {
            "name": read.download.name,
            "path": printable(str(read.download.path)),
            "shards": len(read.shards),
            "fingerprint": read.fingerprint,
            "tars": sum(shard.tar is not None for shard in read.download.shards),
            "known_by_key": read.num_by_key,
            "bytes": sum(shard.num_bytes for shard in read.shards),
            "samples_in_tars": None if read.contents is None else sum(shard.num_samples or 0 for shard in read.shards),
            "counts": self._counts[i],
            "reasons": reasons,
            "outages": [asdict(outage) for outage in outages(losses)],
            "damaged_shards": read.damaged,
            "places": [asdict(each) for each in places],
            "bias": bias.document(),
            "content": self._content(i),
        }

    def pairs(self) -> list[Pair]:
        """Every two downloads against each other."""
        names = [download.name for download in self.inputs.downloads]
        seen = self.request.samples_seen or max((run.samples_seen for run in self.inputs.runs), default=None)
        found = []
        with self.stage("pairs"):
            for i, j in combinations(range(len(names)), 2):
                pair = compare_pair(self.engine, self.membership.pair(i, j), (names[i], names[j]), seen)
                first, second = self.reads[i].looks, self.reads[j].looks
                if first is not None and second is not None:
                    tiers, table = compare_looks(self.engine, first, second, self._file(f"between-{i}-{j}"))
                    pair = replace(pair, looks=asdict(tiers))
                    self._lists[f"differ_{names[i]}__{names[j]}"] = table
                found.append(pair)
        return found

    def runs(self) -> list[dict[str, Any]]:
        """What each training run saw of the download it was trained on."""
        found = []
        for j, run in enumerate(self.inputs.runs):
            i = self.download_of(run)
            found.append(
                {
                    "name": run.name,
                    "download": self.inputs.downloads[i].name,
                    "samples_seen": run.samples_seen,
                    "positions_are_exact": run.are_exact,
                    "data_fingerprint": run.manifest.fingerprint,
                    **self.membership.trained_counts(self.engine, i, j),
                }
            )
        return found

    def notes(self, parts: Sequence[Mapping[str, Any]]) -> list[str]:
        """Rows and samples that have no identity, which the counts leave out."""
        found = []
        if self._nameless:
            found.append(f"{self._nameless:,} row(s) of the list have no {self.inputs.identity}, and are left out.")
        for part, read in zip(parts, self.reads, strict=True):
            found += notes_on(part, 0 if read.attempts is None else self._rows_without_uid(read.attempts))
        return found

    def _rows_without_uid(self, table: Any) -> int:
        return int(self.engine.rows(table.agg(n=table.uid.isnull().cast("int64").sum()))[0]["n"] or 0)

    def lists(self) -> dict[str, Any]:
        """Queries of all lists to write, by their names below `lists/`; after the parts above."""
        found = dict(self._lists)
        names = [download.name for download in self.inputs.downloads]
        for i, read in enumerate(self.reads):
            classes = {"usable": self.membership.wanted_and_usable(i), **self.membership.classes(i)}
            if self.inputs.published.url and read.attempts is not None:
                classes["retry"] = self.membership.retry(self._published, i)
            found |= {self._list_name(i, kind): query for kind, query in classes.items()}
        if len(names) > 1:
            found["common"] = self.membership.common()
        for name, read in zip(names, self.reads, strict=True):
            if len(names) > 1 and self.inputs.identity == "url" and read.contents is not None:
                found[f"common_in_{name}"] = self.membership.common_as_known(read.contents)
        for i, j in combinations(range(len(names)), 2):
            table = self.membership.pair(i, j)
            found[f"only_{names[i]}__not_{names[j]}"] = table.filter(table.first & ~table.second).select("uid")
            found[f"only_{names[j]}__not_{names[i]}"] = table.filter(table.second & ~table.first).select("uid")
        for j, run in enumerate(self.inputs.runs):
            found[f"trained_{run.name}"] = self.membership.trained(j)
            found[f"untrained_{run.name}"] = self.membership.untrained(self.download_of(run), j)
        return found

    def download_of(self, run: TrainedRun) -> int:
        """The download whose shards a run was trained on; raises `AuditError` where there is none."""
        fitting = []
        for i, read in enumerate(self.reads):
            counts = {shard.name: shard.num_samples for shard in read.shards}
            if all(counts.get(name) == count for name, count in run.shards.items()):
                fitting.append(i)
        trained_on = f"the folder it was trained on ({run.recipe.data.train})"
        if not fitting:
            raise AuditError(
                f"--run {run.path}: no download has its {len(run.shards)} shards with as many samples. Give "
                f"{trained_on} as a --download."
            )
        if len(fitting) > 1:  # two reshards of one list look alike: the folder must tell
            fitting = [i for i in fitting if run.tars <= self.reads[i].tars]
        if len(fitting) != 1:
            raise AuditError(
                f"--run {run.path}: several downloads have its shards with as many samples, and none lies where it was "
                f"trained. Give {trained_on}."
            )
        return fitting[0]

    def _read(self, pool: ProcessPoolExecutor | None) -> list[ReadDownload]:
        reads, workers = [], self.request.num_workers
        for i, download in enumerate(self.inputs.downloads):
            folder = self._cache / f"download-{i}"
            with self.stage(f"reading {download.name}"):
                read = read_download(download, self.inputs.identity, self.engine, folder, pool, workers, self._progress)
            if self.request.deep:
                with self.stage(f"decoding {download.name}"):
                    read = decode_pictures(read, self.engine, folder / "pictures", workers, self._progress)
            reads.append(read)
        with self.stage("hosts"):
            return tell_resolver_failures(reads, self.engine, self._file("hosts"))

    def _file(self, name: str) -> Path:
        """Where a result is kept that holds while the inputs do."""
        return self._cache / f"{name}-{self.inputs.digest}.parquet"

    def _fates(self) -> Path:
        path = self._file("fates")
        if path.exists():
            return path
        requested = None
        if self.request.subset_file:
            write_subset(self.request.subset_file, self._file("subset"))
            requested = self.engine.parquet([self._file("subset")])
        runs = [self._seen_by(j, run) for j, run in enumerate(self.inputs.runs)]
        query = fates(self._published, requested, [read.sources for read in self.reads], runs)
        with self.stage("fates of all samples"):
            self.engine.save(query, path)
        return path

    def _seen_by(self, j: int, run: TrainedRun) -> Any:
        """Uids that a run saw, and how often, by the tars of the download it was trained on."""
        contents = self.reads[self.download_of(run)].contents
        path = self._file(f"run-{j}")
        with self.stage(f"order of {run.name}"):
            run.write(path)
        joined = self.engine.parquet([path]).inner_join(contents, ["shard", "position"])
        return joined.group_by("uid").agg(times=joined.times.sum())

    def _reasons(self, i: int) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "count": count,
                "words": REASONS[name].words if name in REASONS else "no parquet tells",
                "is_passing": name in REASONS and REASONS[name].is_passing,
            }
            for name, count in self.membership.reasons(self.engine, i)
        }

    def _judged(self, i: int) -> Any:
        path = self._file(f"judged-{i}")
        if not path.exists():
            with self.stage("joining the list"):
                self.engine.save(self.membership.judged(self._published, i), path)
        return self.engine.parquet([path])

    def _places(self, i: int, judged: Any, losses: Sequence[ShardLoss]) -> list[Places]:
        found = []
        if self.inputs.published.url:
            kept = judged[KEPT]
            found += [losses_by(self.engine, judged.select(kept=kept, name=judged[of]), of) for of in (DOMAIN, TLD)]
        if losses:
            found.append(losses_in("shard", [(loss.shard, loss.attempted, loss.failed) for loss in losses]))
        days = {shard.name: shard.started for shard in self.reads[i].shards if shard.started}
        totals: dict[str, tuple[int, int]] = {}
        for loss in losses if days else ():
            day = days.get(loss.shard, "(unknown)")
            attempted, failed = totals.get(day, (0, 0))
            totals[day] = attempted + loss.attempted, failed + loss.failed
        if totals:
            found.append(losses_in("day", [(day, *counts) for day, counts in totals.items()]))
        return found

    def _content(self, i: int) -> dict[str, Any] | None:
        """None where nothing tells which bytes a url gave."""
        if not self.inputs.published.url:
            return None
        read = self.reads[i]
        looks = [each.looks for each in self.reads if each.looks is not None]
        fetched = Fetched(read.originals(self._published), read.looks)
        with self.stage("content"):
            content = examine(self.engine, self._judged(i), fetched, looks, self._cache, f"{i}-{self.inputs.digest}")
        self._lists |= {self._list_name(i, name): query for name, query in content.lists.items()}
        return content.document()

    def _list_name(self, i: int, kind: str) -> str:
        """The first download's lists stand in `lists/` itself, those of the others in a folder each."""
        return f"{self.inputs.downloads[i].name}/{kind}" if i else kind
