"""What training on two downloads, on what they share and on random drops as large says of their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuclip_scale.audit.empirical_arms import ROLES
from neuclip_scale.evaluation.statistics import Estimate, mean_interval, student_t_quantile


@dataclass(frozen=True)
class ArmScore:
    """One arm's scores, in points."""

    name: str
    num_pairs: int
    scores: tuple[float, ...]
    """One a seed."""
    estimate: Estimate


@dataclass(frozen=True)
class Empirical:
    """The arms, and the difference of the downloads against that of random drops."""

    arms: tuple[ArmScore, ...]
    arm_of: dict[str, str]
    """`first`, `second`, `common` -> arm."""
    difference: Estimate
    """First minus second, paired by seed, in points."""
    of_drops: Estimate
    """The same of random drops as large as they are; one value a drop, the mean over seeds."""
    drop_limits: tuple[float, float] | None
    """Where the difference of one more pair of drops would lie with 95 %; None for fewer than two drops."""
    common_against_drops: float
    """Mean score of the common subset minus that of random drops of its size, in points."""
    sentence: str

    def document(self) -> dict[str, Any]:
        """For JSON."""
        arms = [{**asdict(arm), "estimate": arm.estimate._asdict()} for arm in self.arms]
        estimates = {"difference": self.difference._asdict(), "of_drops": self.of_drops._asdict()}
        return {**asdict(self), "arms": arms, **estimates}


def summarise(
    scores: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    arm_of: Mapping[str, str],
    drops_of: Mapping[str, Sequence[str]],
    setting: str,
) -> Empirical:
    """Compare arms from their `scores`, arm -> one a seed in points; `setting` says in the sentence what was trained.

    Raises ValueError for arms of other numbers of seeds.
    """
    seeds = {len(values) for values in scores.values()}
    if len(seeds) != 1:
        raise ValueError(f"scores of {sorted(seeds)} seeds: give every arm the same seeds")
    arms = tuple(ArmScore(name, sizes[name], tuple(each), mean_interval(each)) for name, each in scores.items())
    difference = mean_interval(_paired(scores[arm_of["first"]], scores[arm_of["second"]]))
    pairs = zip(drops_of["first"], drops_of["second"], strict=True)
    drops = [_mean(_paired(scores[first], scores[second])) for first, second in pairs]
    of_drops, limits = mean_interval(drops), prediction_limits(drops)
    common = _mean(scores[arm_of["common"]]) - _mean([_mean(scores[name]) for name in drops_of["common"]])
    said = _sentence(
        {role: _mean(scores[arm_of[role]]) for role in ROLES}, difference, of_drops, limits, common, setting
    )
    return Empirical(arms, dict(arm_of), difference, of_drops, limits, common, said)


def prediction_limits(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Where one more value of a normal distribution lies, mean +- t(n - 1) s sqrt(1 + 1/n); None for one value."""
    if len(values) < 2:
        return None
    mean, n = _mean(values), len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_t_quantile(0.5 + confidence / 2, n - 1) * deviation * math.sqrt(1 + 1 / n)
    return mean - half, mean + half


def _sentence(
    means: Mapping[str, float],
    difference: Estimate,
    of_drops: Estimate,
    limits: tuple[float, float] | None,
    common: float,
    setting: str,
) -> str:
    interval = "" if difference.low is None else f", 95 % interval {difference.low:+.2f} to {difference.high:+.2f}"
    text = (
        f"Trained at small scale ({setting}), the first download scores {means['first']:.2f} and the second "
        f"{means['second']:.2f} points, {difference.mean:+.2f} over {difference.n} seed(s){interval}; {of_drops.n} "
        f"random drop(s) of the same sizes differ by {of_drops.mean:+.2f} on average"
    )
    if limits is None:
        text += ", too few to say whether that is more than chance"
    else:
        more = "no more" if limits[0] <= difference.mean <= limits[1] else "more"
        text += (
            f" and by {limits[0]:+.2f} to {limits[1]:+.2f} with 95 %: the downloads differ {more} than random drops do"
        )
    return f"{text}. On the common subset the score is {common:+.2f} points from random drops of its size."


def _paired(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
