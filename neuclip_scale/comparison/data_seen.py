"""Which samples each run saw, and whether runs saw the same ones in the same order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.untrusted_text import number, show

LENGTH = ("train.num_steps", "train.epochs", "train.global_batch_size")
"""Recipe fields that say how many samples a run sees."""


@dataclass(frozen=True)
class RunData:
    """The data of one run; None where its folder does not tell."""

    label: str
    fingerprint: str | None
    num_shards: int | None
    num_samples: int | None
    samples_seen: float | None
    samples_skipped: float | None
    listed_skips: int
    last_step: int | None


@dataclass(frozen=True)
class BatchOrder:
    """Digests of runs that should have had the same batches: equal seed and global batch size."""

    seed: Any
    global_batch_size: Any
    labels: tuple[str, ...]
    """The runs that have digests."""
    without: tuple[str, ...]
    """The runs that have none."""
    num_compared: int = 0
    """Steps for which at least two runs have a digest."""
    first_step: int = 0
    last_step: int = 0
    parts_at: int | None = None
    """The first step whose digests differ; None if none does."""
    digests: dict[str, str] = field(default_factory=dict)
    """Label -> digest at that step."""
    num_contents: int = 0
    """Steps, of those compared, for which as many runs have a digest of the contents."""
    contents_part_at: int | None = None
    """The first step whose uids are the same and whose contents differ; None if none does."""

    @property
    def text(self) -> str:
        """The finding in words."""
        unknown = f" No digests, so no proof: {', '.join(self.without)}." if self.without else ""
        what = f"seed {show(self.seed)}, global batch {show(self.global_batch_size)}"
        if not self.num_compared:
            return f"{what}: no step has the batch digests of two runs; the order is not proven.{unknown}"
        which = f"{', '.join(self.labels)} ({what})"
        if self.parts_at is not None:
            same = f"the same batches until step {self.parts_at - 1}, " if self.parts_at > self.first_step else ""
            shown = ", ".join(f"{label} {digest}" for label, digest in self.digests.items())
            return f"{which}: {same}other samples or another order from step {self.parts_at} on ({shown}).{unknown}"
        whole = self.num_compared == self.last_step - self.first_step + 1
        some = "" if whole else f" (the {self.num_compared} of them that two runs or more recorded)"
        steps = f"for steps {self.first_step}..{self.last_step}{some}"
        if self.contents_part_at is not None:
            other = f"other pictures or captions under the same uids from step {self.contents_part_at} on"
            return f"{which}: the same uids {steps}, but {other}.{unknown}"
        read = "" if self.num_contents == self.num_compared else " by their uids; not every run recorded what it read"
        return f"{which}: the same batches {steps}{read}.{unknown}"

    @property
    def is_discrepancy(self) -> bool:
        """Whether the runs are known to have read something else."""
        return self.parts_at is not None or self.contents_part_at is not None


@dataclass(frozen=True)
class DataSeen:
    """The data of all runs, and how they compare."""

    runs: list[RunData]
    orders: list[BatchOrder]
    notes: list[str]
    """What is not compared, and why."""
    discrepancies: list[str]

    @property
    def contents_known(self) -> bool:
        """Whether runs that had the same uids all recorded what they read under them."""
        return all(order.num_contents == order.num_compared for order in self.orders)


def data_seen(runs: Sequence[RunFolder], by_design: Sequence[str] = ()) -> DataSeen:
    """Compare fingerprints, counts and batch digests.

    `by_design`: recipe fields that are meant to differ; where one of `LENGTH` does, so may the samples seen.
    """
    lengths = [name for name in LENGTH if name in by_design]
    rows = [_run_data(run) for run in runs]
    orders = batch_orders(runs)
    groups: dict[str, list[RunData]] = defaultdict(list)
    for run, row in zip(runs, rows, strict=True):
        groups[repr([_field(run, name) for name in lengths])].append(row)
    counts = [text for group in groups.values() for text in _unequal_counts(group)]
    discrepancies = [*_other_data(rows), *counts, *(order.text for order in orders if order.is_discrepancy)]
    notes = _notes(runs, rows)
    if lengths and not counts:
        notes += [f"By design ({', '.join(lengths)}): {text}" for text in _unequal_counts(rows)]
    return DataSeen(rows, orders, notes, discrepancies)


def batch_orders(runs: Sequence[RunFolder]) -> list[BatchOrder]:
    """One entry for each seed and global batch size that two runs or more share."""
    groups: dict[tuple[str, str], list[RunFolder]] = defaultdict(list)
    for run in runs:
        if run.recipe is not None:
            groups[repr(run.seed), repr(_batch_size(run))].append(run)
    return [compare_orders(group) for group in groups.values() if len(group) > 1]


def compare_orders(runs: Sequence[RunFolder]) -> BatchOrder:
    """Compare the batch digests of `runs`, which share seed and global batch size, step by step."""
    by_step: dict[int, dict[str, str]] = defaultdict(dict)
    contents: dict[int, dict[str, str]] = defaultdict(dict)
    for run in runs:
        for number_of_step, step in (run.steps.by_number if run.steps else {}).items():
            if step.digest is not None:
                by_step[number_of_step][run.label] = step.digest
                if step.contents is not None:
                    contents[number_of_step][run.label] = step.contents
    told = {label for digests in by_step.values() for label in digests}
    compared = sorted(place for place, digests in by_step.items() if len(digests) > 1)
    parted = next((place for place in compared if len(set(by_step[place].values())) > 1), None)
    same = [place for place in compared if parted is None or place < parted]
    return BatchOrder(
        seed=runs[0].seed,
        global_batch_size=_batch_size(runs[0]),
        labels=tuple(run.label for run in runs if run.label in told),
        without=tuple(run.label for run in runs if run.label not in told),
        num_compared=len(compared),
        first_step=compared[0] if compared else 0,
        last_step=compared[-1] if compared else 0,
        parts_at=parted,
        digests={} if parted is None else by_step[parted],
        num_contents=sum(len(contents[place]) == len(by_step[place]) for place in compared),
        contents_part_at=next((place for place in same if len(set(contents[place].values())) > 1), None),
    )


def _batch_size(run: RunFolder) -> Any:
    return _field(run, "train.global_batch_size")


def _field(run: RunFolder, name: str) -> Any:
    return None if run.recipe is None else run.recipe.fields.get(name)


def _run_data(run: RunFolder) -> RunData:
    summary, shards, steps = run.summary or {}, run.shards, run.steps
    last = steps.by_number[steps.last] if steps and steps.by_number else None
    return RunData(
        label=run.label,
        fingerprint=shards.fingerprint if shards else None,
        num_shards=shards.num_shards if shards else None,
        num_samples=shards.num_samples if shards else None,
        samples_seen=number(summary.get("samples_seen", last.samples_seen if last else None)),
        samples_skipped=number(summary.get("samples_skipped", steps.num_skipped if steps else None)),
        listed_skips=run.num_listed_skips,
        last_step=steps.last if steps and last else None,
    )


def _other_data(rows: Sequence[RunData]) -> list[str]:
    """The sentence about fingerprints that are not the same in all runs that have one, if so."""
    prints = {row.label: row.fingerprint for row in rows if row.fingerprint is not None}
    if len(set(prints.values())) < 2:
        return []
    shown = ", ".join(f"{label} {value}" for label, value in prints.items())
    return [f"Training data differ (fingerprints of the shards): {shown}."]


def _unequal_counts(rows: Sequence[RunData]) -> list[str]:
    """The sentence about samples seen that are not equally many, if so."""
    seen = {row.label: row.samples_seen for row in rows if row.samples_seen is not None}
    if len(set(seen.values())) < 2:
        return []
    shown = ", ".join(f"{label} {value:,.0f}" for label, value in seen.items())
    return [f"Numbers of samples seen differ: {shown}."]


def _notes(runs: Sequence[RunFolder], rows: Sequence[RunData]) -> list[str]:
    known = [run for run in runs if run.recipe is not None]
    notes = []
    if len({repr(run.seed) for run in known}) > 1:
        notes.append("Seeds differ, so orders differ by design: between seeds only the fingerprint is checked.")
    if len({repr(_batch_size(run)) for run in known}) > 1:
        notes.append("Global batch sizes differ, so their digests are of other batches and are not compared.")
    if len({row.samples_skipped for row in rows if row.samples_skipped is not None}) > 1:
        notes.append("Different numbers of samples were skipped; with another order that can happen on the same data.")
    return notes
