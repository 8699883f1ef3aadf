"""Where samples were lost: by domain, top-level domain, shard and day, each share with its Wilson interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuclip_scale.audit.statistics import wilson_interval
from neuclip_scale.queries.engines import Engine

TOP = 200
"""Rows of a table at most; the rest is summed up in one line."""


@dataclass(frozen=True)
class Place:
    """Samples of one domain, shard or day."""

    name: str
    total: int
    lost: int
    share: float
    low: float
    """Of the 95 % interval."""
    high: float


@dataclass(frozen=True)
class Places:
    """The groups that lost most, and what is left out."""

    what: str
    rows: tuple[Place, ...]
    num_groups: int
    lost_elsewhere: int
    """Lost samples of groups that are not among `rows`."""


def losses_by(engine: Engine, table: Any, what: str) -> Places:
    """By the column `name` of a table with `kept` (true or false)."""
    import ibis

    grouped = table.group_by(name=table.name.fill_null("")).agg(
        total=table.kept.count(), lost=(~table.kept).cast("int64").sum()
    )
    whole = engine.rows(grouped.agg(groups=grouped.count(), lost=grouped.lost.sum()))[0]
    rows = engine.rows(grouped.order_by([ibis.desc("lost"), ibis.desc("total"), "name"]).limit(TOP))
    return _places(what, rows, whole["groups"], whole["lost"] or 0)


def losses_in(what: str, groups: Sequence[tuple[str, int, int]]) -> Places:
    """Of groups (name, total, lost) that are known already."""
    worst = sorted(groups, key=lambda group: (-group[2], group[0]))
    rows = [{"name": name, "total": total, "lost": lost} for name, total, lost in worst[:TOP]]
    return _places(what, rows, len(groups), sum(lost for _, _, lost in groups))


def _places(what: str, rows: Sequence[dict[str, Any]], num_groups: int, lost: int) -> Places:
    places = []
    for row in rows:
        low, high = wilson_interval(row["lost"], row["total"])
        share = row["lost"] / row["total"] if row["total"] else 0.0
        places.append(Place(row["name"] or "(none)", row["total"], row["lost"], share, low, high))
    return Places(what, tuple(places), num_groups, lost - sum(place.lost for place in places))
