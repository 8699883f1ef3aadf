"""Does it matter? A claimed gain, or any, beside what seeds and the difference of two downloads could make."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from neuclip_scale.audit.effect import Assumptions, Downloads, judge_gain
from neuclip_scale.audit.effect_sources import Metric
from neuclip_scale.audit.errors import UsageError
from neuclip_scale.audit.pairs import Pair


@dataclass(frozen=True)
class Claim:
    """What is said of two runs, the first on the first download and the second on the second; scores in points."""

    gain: float | None = None
    """First minus second; None where nothing is claimed, and the mean scores differ by it where they are given."""
    metric: Metric = "average"
    first_scores: tuple[float, ...] = ()
    """One a seed."""
    second_scores: tuple[float, ...] = ()
    assumptions: Assumptions = field(default_factory=Assumptions)

    def check(self) -> None:
        """Raise `UsageError` for a gain that is no number or contradicts the scores."""
        points = self.points
        values = [*self.first_scores, *self.second_scores, *([] if points is None else [points])]
        if not all(map(math.isfinite, values)):
            raise UsageError(f"--gain, --first-scores, --second-scores: {values} are not all finite. Give points.")
        if self.gain is not None and self.first_scores and self.second_scores:
            means = [sum(scores) / len(scores) for scores in (self.first_scores, self.second_scores)]
            if abs(means[0] - means[1] - self.gain) > 0.01:
                raise UsageError(
                    f"--gain {self.gain}: the mean scores differ by {means[0] - means[1]:.2f}. Leave it out."
                )

    @property
    def points(self) -> float | None:
        """The gain as given, or as the scores have it. Raises `UsageError` for scores of one run only."""
        if self.gain is not None:
            return self.gain
        if bool(self.first_scores) != bool(self.second_scores):
            raise UsageError("--first-scores, --second-scores: give both, or --gain.")
        if not self.first_scores:
            return None
        return sum(self.first_scores) / len(self.first_scores) - sum(self.second_scores) / len(self.second_scores)


def effect_of(pair: Pair, claim: Claim) -> dict[str, Any] | None:
    """The document's part on a pair; None where a download holds nothing. Raises `UsageError` for scores that do not
    fit the gain."""
    first, second = pair.common + pair.only_first, pair.common + pair.only_second
    if not first or not second:
        return None
    points = claim.points
    try:
        effect = judge_gain(
            points if points is not None else 0.0,
            Downloads(first=first, second=second, common=pair.common),
            metric=claim.metric,
            samples_seen=pair.samples_seen,
            first_scores=claim.first_scores,
            second_scores=claim.second_scores,
            assumptions=claim.assumptions,
        )
    except ValueError as error:
        raise UsageError(f"--gain: {error}.") from error
    what = "the 38-task average" if claim.metric == "average" else "ImageNet"
    any_gain = (
        f"Between one run on {pair.first} and one on {pair.second}, up to {effect.explainable:.2f} points on {what} "
        f"could come from elsewhere than the methods: {effect.noise_limit:.2f} from seeds, {effect.quantity:.2f} from "
        f"the number of pairs and {effect.selection:.2f} from which pairs they are."
    )
    said = [any_gain if points is None else effect.sentence, *(f"Assumed: {each}." for each in effect.assumptions)]
    return {"claimed": points is not None, **effect.document(), "sentences": said}
