"""The audit itself: reads the shards, computes every sample's fate, and from it all parts of the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from neuclip_scale.audit import addresses
from neuclip_scale.audit.bias import measure_bias
from neuclip_scale.audit.downloads import Download
from neuclip_scale.audit.engines import Engine
from neuclip_scale.audit.errors import AuditError
from neuclip_scale.audit.fates import Sources, fates
from neuclip_scale.audit.inputs import Inputs, write_subset
from neuclip_scale.audit.membership import KEPT, Membership
from neuclip_scale.audit.outages import outages, shard_losses
from neuclip_scale.audit.pairs import Pair, compare_pair
from neuclip_scale.audit.places import losses_by_address, losses_in
from neuclip_scale.audit.reasons import REASONS, hosts_reached, told_reason, with_resolver_failures
from neuclip_scale.audit.request import AuditRequest
from neuclip_scale.audit.scanning import ScanJob, ScannedShard
from neuclip_scale.audit.trained import TrainedRun
from neuclip_scale.reshard.workers import ordered

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done of it, and the whole."""


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
        self.cache = request.output / "cache"
        self.seconds: dict[str, float] = {}
        self._pool = pool
        self._progress = progress
        self.scanned = [self._scan(i, download) for i, download in enumerate(inputs.downloads)]
        self.published = inputs.published.table(engine, inputs.identity)
        self.sources = self._sources()
        self.membership = Membership(engine.parquet([self._fates()]), inputs, request.subset_file is not None)
        self.counts = [self.membership.counts(engine, i) for i in range(len(inputs.downloads))]
        if self.counts[0]["listed_more_than_once"]:
            self.published = self.published.distinct(on="uid", keep="first")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and note the seconds of the block."""
        self._progress(name, 0, 0)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def download_part(self, i: int) -> dict[str, Any]:
        """What the document says of download i."""
        download, scanned, attempts = self.inputs.downloads[i], self.scanned[i], self.sources[i].attempts
        with self.stage("reasons"):
            reasons = self._reasons(i)
            losses = [] if attempts is None else shard_losses(self.engine, attempts)
        judged = self._judged(i)
        with self.stage("places"):
            places = self._places(i, judged, [(loss.shard, loss.attempted, loss.failed) for loss in losses])
        with self.stage("bias"):
            bias = measure_bias(judged, KEPT)
        return {
            "name": download.name,
            "path": str(download.path),
            "shards": len(download.shards),
            "tars": sum(shard.tar is not None for shard in download.shards),
            "bytes": sum(shard.num_bytes for shard in scanned),
            "samples_in_tars": sum(shard.num_samples or 0 for shard in scanned) if download.has_tars else None,
            "counts": self.counts[i],
            "reasons": reasons,
            "outages": [asdict(outage) for outage in outages(losses)],
            "damaged_shards": [
                {"shard": shard.name, "fault": f"{kind}: {fault}"}
                for shard in scanned
                for kind, fault in (("tar", shard.tar_fault), ("parquet", shard.parquet_fault))
                if fault
            ],
            "places": places,
            "bias": bias.document(),
        }

    def pairs(self) -> list[Pair]:
        """Every two downloads against each other."""
        names = [download.name for download in self.inputs.downloads]
        seen = self.request.samples_seen or max((run.samples_seen for run in self.inputs.runs), default=None)
        with self.stage("pairs"):
            return [
                compare_pair(self.engine, self.membership.pair(i, j), (names[i], names[j]), seen)
                for i, j in combinations(range(len(names)), 2)
            ]

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

    def lists(self) -> dict[str, Any]:
        """Queries of all lists to write, by their names below `lists/`."""
        found: dict[str, Any] = {}
        names = [download.name for download in self.inputs.downloads]
        for i, name in enumerate(names):
            prefix = f"{name}/" if i else ""
            for kind, query in self.membership.classes(i).items():
                found[prefix + kind] = query
            if self.inputs.published.url and self.sources[i].attempts is not None:
                found[f"{prefix}retry"] = self.membership.retry(self.published, i)
        if len(names) > 1:
            found["common"] = self.membership.common()
        for i, j in combinations(range(len(names)), 2):
            table = self.membership.pair(i, j)
            found[f"only_{names[i]}_not_{names[j]}"] = table.filter(table.first & ~table.second).select("uid")
            found[f"only_{names[j]}_not_{names[i]}"] = table.filter(table.second & ~table.first).select("uid")
        for j, run in enumerate(self.inputs.runs):
            found[f"untrained_{run.name}"] = self.membership.untrained(self.download_of(run), j)
        return found

    def _scan(self, i: int, download: Download) -> list[ScannedShard]:
        job = self._job(i)
        stage = f"reading {download.name}"
        began = time.perf_counter()
        found = []
        try:
            for scanned in ordered(self._pool, job, download.shards, 4 * self.request.num_workers):
                found.append(scanned)
                self._progress(stage, len(found), len(download.shards))
        except OSError as error:
            what = f"{error.filename or ''} {error.strerror or error}"
            raise AuditError(f"{stage}: {what}. Mend that and run the same command again: it goes on.") from error
        self.seconds[stage] = time.perf_counter() - began
        return found

    def _job(self, i: int) -> ScanJob:
        return ScanJob(self.cache / f"download-{i}", self.inputs.identity)

    def _sources(self) -> list[Sources]:
        tables = []
        for i, download in enumerate(self.inputs.downloads):
            job = self._job(i)
            attempts, contents = (self._table(job.files(kind, download.shards)) for kind in ("attempts", "contents"))
            if attempts is not None:
                reason = told_reason(attempts.status, attempts.error_message)
                attempts = attempts.mutate(host=addresses.host(attempts.url), reason=reason)
            tables.append((attempts, contents))
        known = [hosts_reached(attempts) for attempts, _ in tables if attempts is not None]
        sources = []
        for i, (attempts, contents) in enumerate(tables):
            if attempts is not None:
                reached = known[0].union(*known[1:], distinct=True) if len(known) > 1 else known[0]
                attempts = with_resolver_failures(attempts, reached)
            damaged = tuple(shard.name for shard in self.scanned[i] if shard.tar_fault)
            sources.append(Sources(attempts, contents, damaged))
        return sources

    def _table(self, files: Sequence[Path]) -> Any | None:
        return self.engine.parquet(files) if files else None

    def _fates(self) -> Path:
        path = self.cache / f"fates-{self.inputs.digest}.parquet"
        if path.exists():
            return path
        requested = None
        if self.request.subset_file:
            subset = self.cache / f"subset-{self.inputs.digest}.parquet"
            write_subset(self.request.subset_file, subset)
            requested = self.engine.parquet([subset])
        runs = [self._seen_by(j, run) for j, run in enumerate(self.inputs.runs)]
        query = fates(self.published, requested, self.sources, runs)
        with self.stage("fates of all samples"):
            self.engine.save(query, path)
        return path

    def _seen_by(self, j: int, run: TrainedRun) -> Any:
        """Uids that a run saw, and how often, by the tars of the download it was trained on."""
        i = self.download_of(run)
        contents = self.sources[i].contents
        path = self.cache / f"run-{j}-{self.inputs.digest}.parquet"
        with self.stage(f"order of {run.name}"):
            run.write(path)
        seen = self.engine.parquet([path])
        assert contents is not None
        joined = seen.inner_join(contents, ["shard", "position"])
        return joined.group_by("uid").agg(times=joined.times.sum())

    def download_of(self, run: TrainedRun) -> int:
        """The download whose shards a run was trained on; raises `AuditError` where there is none."""
        for i, scanned in enumerate(self.scanned):
            counts = {shard.name: shard.num_samples for shard in scanned}
            if all(counts.get(name) == count for name, count in run.shards.items()):
                return i
        raise AuditError(
            f"--run {run.path}: no download has its {len(run.shards)} shards with as many samples. Give the folder it "
            f"was trained on ({run.recipe.data.train}) as a --download."
        )

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
        path = self.cache / f"judged-{i}-{self.inputs.digest}.parquet"
        if not path.exists():
            with self.stage("joining the list"):
                self.engine.save(self.membership.judged(self.published, i), path)
        return self.engine.parquet([path])

    def _places(self, i: int, judged: Any, by_shard: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
        found = []
        if self.inputs.published.url:
            found += losses_by_address(self.engine, judged.select("url", kept=judged[KEPT]))
        if by_shard:
            found.append(losses_in("shard", by_shard))
        days = {shard.name: shard.started for shard in self.scanned[i] if shard.started}
        if days and by_shard:
            totals: dict[str, list[int]] = {}
            for name, attempted, failed in by_shard:
                day = totals.setdefault(days.get(name, "(unknown)"), [0, 0])
                day[0], day[1] = day[0] + attempted, day[1] + failed
            rows = [(day, attempted, failed) for day, (attempted, failed) in sorted(totals.items())]
            found.append(losses_in("day", rows))
        return [asdict(places) for places in found]
