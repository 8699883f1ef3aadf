"""Shards that lost much at once, told apart from links that rot one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuclip_scale.audit.reasons import REASONS
from neuclip_scale.queries.engines import Engine

MIN_SHARE = 0.5
"""An outage fails at least this share of a shard for reasons that pass..."""
TIMES_USUAL = 3.0
"""...and this many times the share of the shard that stands a quarter of the way up from the best."""
MIN_ATTEMPTS = 10

_PASSING = {"dns", *(name for name, reason in REASONS.items() if reason.is_passing)}


@dataclass(frozen=True)
class Outage:
    """A shard whose download failed as a whole."""

    shard: str
    attempted: int
    passing: int
    """Failures for reasons that pass: time-outs, a resolver, broken connections, ..."""
    main_reason: str
    usual_share: float
    """Of the shard a quarter of the way up from the best: most of a download may have failed."""


@dataclass(frozen=True)
class ShardLoss:
    """One shard's attempts."""

    shard: str
    attempted: int
    failed: int
    passing: int
    main_reason: str


def shard_losses(engine: Engine, attempts: Any) -> list[ShardLoss]:
    """Failures of every shard; one row a shard comes back, each of thousands of samples."""
    counted = attempts.group_by(["shard", "reason"]).agg(count=attempts.count())
    by_shard: dict[str, dict[str, int]] = {}
    for row in engine.rows(counted):
        by_shard.setdefault(row["shard"], {})[row["reason"]] = row["count"]
    losses = []
    for shard, counts in sorted(by_shard.items()):
        failures = {reason: count for reason, count in counts.items() if reason != "success"}
        passing = {reason: count for reason, count in failures.items() if reason in _PASSING}
        main = max(sorted(passing), key=lambda reason: passing[reason], default="")
        losses.append(ShardLoss(shard, sum(counts.values()), sum(failures.values()), sum(passing.values()), main))
    return losses


def outages(losses: Sequence[ShardLoss]) -> list[Outage]:
    """Shards that failed as a whole, by the two limits above."""
    shares = [loss.passing / loss.attempted for loss in losses]
    usual = sorted(shares)[(len(shares) - 1) // 4] if shares else 0.0
    return [
        Outage(loss.shard, loss.attempted, loss.passing, loss.main_reason, usual)
        for loss, share in zip(losses, shares, strict=True)
        if loss.attempted >= MIN_ATTEMPTS and share >= MIN_SHARE and share >= TIMES_USUAL * usual
    ]
