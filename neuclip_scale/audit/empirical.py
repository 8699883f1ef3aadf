"""`--empirical`: trains on two downloads, on what they share and on random drops as large, at small scale."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neuclip_scale.audit.downloads import Download
from neuclip_scale.audit.empirical_arms import Arms, EmpiricalError, plan_arms, read_uids
from neuclip_scale.audit.empirical_summary import Empirical, summarise
from neuclip_scale.audit.request import EmpiricalOptions
from neuclip_scale.files import atomic_file, write_json

if TYPE_CHECKING:
    from neuclip_scale.studies.methods.settings import MethodsStudy

Report = Callable[[str], None]


def join_pools(downloads: Sequence[Download], folder: Path) -> Path:
    """A folder of links to the shards of all downloads, and no others, which `neuclip reshard` takes for one pool."""
    links: dict[Path, Path] = {}
    for download in downloads:
        for shard in download.shards:
            for file in (shard.tar, shard.parquet):
                if file is None:
                    continue
                if isinstance(file, str):
                    raise EmpiricalError(f"--empirical: {file} is remote. Copy the download first.")
                if shard.tar:
                    # Not the file's name: a manifest may name shards of several folders, called alike.
                    stem = shard.name.replace(os.sep, "_")
                    links[folder / f"{download.name}-{stem}{file.suffix}"] = file.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():
        if link.is_symlink() and links.get(link) != link.readlink():
            link.unlink()
    for link, file in links.items():
        if not link.is_symlink():
            link.symlink_to(file)
    return folder


@dataclass(frozen=True, kw_only=True)
class EmpiricalCheck:
    """What to train on, and how."""

    output: Path
    """Folder for shards, runs and the result. Finished runs in it are kept, a killed check goes on where it stopped."""
    pool: Path
    """Folder of tars that holds every pair of both downloads."""
    first: Path
    """Uids of the first download: .npy of DataComp, parquet or text."""
    second: Path
    """Uids of the second."""
    common: Path | None = None
    """Uids on which a comparison is fair; None takes those in both."""
    options: EmpiricalOptions = field(default_factory=EmpiricalOptions)
    num_workers: int = 1
    """Processes that write shards."""


def run_check(check: EmpiricalCheck, report: Report) -> Empirical:
    """Write the arms' shards, train what is missing, and compare; the result stands in `output`/empirical.json too.

    Raises `EmpiricalError`, `ReshardError` for a pool or lists that cannot be used, `ConfigError` for a recipe, and
    `StudyError` for runs that failed.
    """
    if check.options.drops < 1 or not check.options.seeds:
        raise EmpiricalError(f"drops = {check.options.drops}, seeds = {check.options.seeds}: give at least one of each")
    setting = _setting(check)
    common = None if check.common is None else read_uids(check.common, "common")
    first, second = read_uids(check.first, "first"), read_uids(check.second, "second")
    arms = plan_arms(first, second, common, check.options.drops, check.options.max_pairs)
    report(f"{len(arms.rows)} arms of {len(arms.union):,} pairs, {len(check.options.seeds)} seed(s) each")
    scores = {}
    for number, name in enumerate(arms.rows, 1):
        report(f"arm {number}/{len(arms.rows)} {name}: {len(arms.rows[name]):,} pairs")
        _write_shards(check, arms, name)
        scores[name] = _train(check, name, report)
    sizes = {name: len(rows) for name, rows in arms.rows.items()}
    found = summarise(scores, sizes, arms.arm_of, arms.drops_of, setting)
    write_json(check.output / "empirical.json", found.document())
    return found


def _setting(check: EmpiricalCheck) -> str:
    """What is trained, in words; raises where the recipe gives no score."""
    from neuclip_scale.studies.methods.plan import base_recipe

    recipe = base_recipe(_study(check, "first"))
    if not recipe.evaluation.data:
        raise EmpiricalError("evaluation.data = '': arms are compared by held-out scores. Add evaluation.data=FOLDER.")
    seen = recipe.train.num_steps * recipe.train.global_batch_size
    return f"{recipe.model.preset}, {check.options.method}, {seen:,} samples seen"


def _study(check: EmpiricalCheck, arm: str) -> MethodsStudy:
    from neuclip_scale.studies.methods.settings import MethodsStudy

    return MethodsStudy(
        output=check.output / "arms" / arm,
        recipe=check.options.recipe,
        data=str(_shards(check, arm)),
        methods=(check.options.method,),
        seeds=check.options.seeds,
        budgets=("samples",),
        larger=(),
        overrides=check.options.set,
        jobs=check.options.jobs,
        launcher=check.options.launcher,
    )


def _shards(check: EmpiricalCheck, arm: str) -> Path:
    return check.output / "arms" / arm / "shards"


def _write_shards(check: EmpiricalCheck, arms: Arms, arm: str) -> None:
    """The arm's pairs as shards in a random order, unless they are there."""
    from neuclip_scale.reshard.copying import CopyJob
    from neuclip_scale.reshard.finishing import finish
    from neuclip_scale.reshard.options import DEFAULT_SHARD_SIZE, ReshardOptions
    from neuclip_scale.reshard.planning import prepare
    from neuclip_scale.reshard.running import copy_outputs
    from neuclip_scale.reshard.workers import worker_pool

    uids, folder = arms.uids(arm), _shards(check, arm)
    listed = folder.with_name("uids.npy")
    if listed.exists() and not np.array_equal(np.load(listed), uids):
        raise EmpiricalError(f"output {check.output}: {listed} holds other pairs than asked now. Give another output.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not listed.exists():
        with atomic_file(listed) as file:
            np.save(file, uids)
    size = min(DEFAULT_SHARD_SIZE, -(-len(uids) // 16))  # small sets too give several streams shards of their own
    options = ReshardOptions(
        input_dir=check.pool, output_dir=folder, subset_file=listed, shard_size=size, shuffle_seed=0,
        num_workers=check.num_workers,
    )  # fmt: skip
    options.check()
    with worker_pool(options.num_workers) as pool:
        saved = prepare(options, pool, _silent)
        job = CopyJob(options.output_dir, options.input_dir, options.images, "1of1")
        copy_outputs(saved, job, range(saved.plan.num_outputs), pool, options.num_workers, _silent)
    totals = finish(saved, options.input_dir)
    if totals.missing or totals.dropped:
        lacks = f"lacks {totals.missing + totals.dropped:,} of the {len(uids):,} pairs of {arm}"
        raise EmpiricalError(f"pool {check.pool}: {lacks}. Give a pool that holds all pairs of both downloads.")


def _train(check: EmpiricalCheck, arm: str, report: Report) -> list[float]:
    """Mean held-out score of each seed, in points."""
    import json
    import statistics

    from neuclip_scale.evaluation.measures import measures
    from neuclip_scale.studies.methods.running import run_study

    folders = run_study(_study(check, arm), report)["samples"]
    scores = []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_bytes())
        found = [measure.value for measure in measures(summary.get("evaluation", {}))]
        if not found:
            raise EmpiricalError(f"{folder}: has no held-out score. Check evaluation.data.")
        scores.append(100 * statistics.mean(found))
    return scores


def _silent(what: str, done: int, whole: int, amount: int) -> None:
    """Small shards need no lines of progress."""
