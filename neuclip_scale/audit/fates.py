"""What became of every sample: one row a uid, over the list and all downloads.

It is one aggregation over all records, not a chain of joins: an engine does it out of core, and duplicates are
counted on the way. Columns: `uid`; `listed`, `requested` (rows of the list, of the subset); and for download i
`attempted_i`, `downloaded_i`, `in_tars_i`, `corrupt_i` (records each) and `reason_i` (why it is missing, else null);
`trained_j` for training run j (times it was seen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any


@dataclass(frozen=True)
class Sources:
    """The tables of one download; None for what it lacks."""

    attempts: Any | None
    """With `uid`, `shard`, `status` and `reason`; see `reasons`."""
    contents: Any | None
    """With `uid` and `fault`."""
    damaged_shards: tuple[str, ...] = ()
    tells_all_attempts: bool = True
    """Whether every shard has a parquet that can be read: else what is in none may have been attempted."""


def fates(listed: Any, requested: Any | None, downloads: Sequence[Sources], runs: Sequence[Any] = ()) -> Any:
    """The table above.

    `listed` and `requested` have a column `uid`; `runs` have `uid` and `times`.
    """
    import ibis

    counts = ["listed", "requested"]
    counts += [
        f"{name}_{i}" for i in range(len(downloads)) for name in ("attempted", "downloaded", "in_tars", "corrupt")
    ]
    counts += [f"trained_{j}" for j in range(len(runs))]
    texts = [f"{name}_{i}" for i in range(len(downloads)) for name in ("lost", "failed")]

    def records(table: Any, **values: Any) -> Any:
        """`table`'s uids with `values`, and nothing in all other columns."""
        columns = {name: ibis.literal(0).cast("int64") for name in counts}
        columns |= {name: ibis.null("string") for name in texts}
        columns |= {name: value if name in texts else value.cast("int64") for name, value in values.items()}
        return table.filter(table.uid.notnull()).select("uid", **columns)

    one = ibis.literal(1)
    parts = [records(listed, listed=one)]
    if requested is not None:
        parts.append(records(requested, requested=one))
    for i, source in enumerate(downloads):
        parts += _of_download(records, i, source)
    for j, run in enumerate(runs):
        parts.append(records(run, **{f"trained_{j}": run.times}))
    together = reduce(lambda left, right: left.union(right), parts)
    summed = together.group_by("uid").agg(
        **{name: together[name].sum() for name in counts}, **{name: together[name].max() for name in texts}
    )
    return summed.mutate(**{f"reason_{i}": _reason(summed, i, source) for i, source in enumerate(downloads)}).drop(
        *texts
    )


def _of_download(records: Any, i: int, source: Sources) -> list[Any]:
    import ibis

    parts = []
    if source.attempts is not None:
        attempts = source.attempts
        success = attempts.status == "success"
        damaged = attempts.shard.isin(list(source.damaged_shards)) if source.damaged_shards else ibis.literal(False)
        lost = ibis.cases((success & damaged, "damaged_shard"), (success, "lost_from_tars"), else_=ibis.null("string"))
        failed = ibis.cases((success, ibis.null("string")), else_=attempts.reason)
        values = {
            f"attempted_{i}": ibis.literal(1),
            f"downloaded_{i}": success,
            f"lost_{i}": lost,
            f"failed_{i}": failed,
        }
        parts.append(records(attempts, **values))
    if source.contents is not None:
        found = {f"in_tars_{i}": ibis.literal(1), f"corrupt_{i}": source.contents.fault.notnull()}
        parts.append(records(source.contents, **found))
    return parts


def _reason(table: Any, i: int, source: Sources) -> Any:
    """Null for what is there; `unknown` where no parquet tells."""
    import ibis

    untold = "never_attempted" if source.attempts is not None and source.tells_all_attempts else "unknown"
    why = ibis.coalesce(table[f"lost_{i}"], table[f"failed_{i}"], ibis.literal(untold))
    return ibis.cases((is_there(table, i, source.contents is not None), ibis.null("string")), else_=why)


def is_there(table: Any, i: int, has_tars: bool) -> Any:
    """Whether a sample is in download i: in its tars, or where there are none downloaded without an error."""
    return (table[f"in_tars_{i}"] if has_tars else table[f"downloaded_{i}"]) > 0
