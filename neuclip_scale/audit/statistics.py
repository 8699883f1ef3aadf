"""Tests and sizes of differences from counts and moments, so that no row need leave the engine that counted it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Size = Literal["negligible", "very small", "small", "medium", "large"]

# Cohen (1988), "Statistical power analysis for the behavioral sciences": d = .2, .5, .8 and w = .1, .3, .5 are small,
# medium and large. Below d = .1 groups count as balanced (Austin, 2009); two equal groups .1 apart have r = .05.
_D_LIMITS: tuple[tuple[float, Size], ...] = ((0.1, "negligible"), (0.2, "very small"), (0.5, "small"), (0.8, "medium"))
_W_LIMITS: tuple[tuple[float, Size], ...] = ((0.05, "negligible"), (0.1, "very small"), (0.3, "small"), (0.5, "medium"))

_LATTICE_UP_TO = 10_000
_KSTWO_UP_TO = 100_000


class ChiSquare(NamedTuple):
    """Pearson's test of a k x 2 table, without continuity correction."""

    statistic: float
    degrees: int
    p: float
    cramers_v: float
    """sqrt(chi-square / n); at most what the smaller side allows."""
    balanced_v: float
    """Cramer's V of the same two distributions, were both sides equally large."""
    residuals: list[float]
    """Adjusted standardised residual of the second column in each row, about N(0, 1) without a difference."""
    smallest_expected: float
    """The test is rough where this is below 5."""


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Limits of the share that `count` of `total` estimates (Wilson, 1927), good at 0, at `total` and for few.

    Without any (`total` = 0) the share can be all: (0, 1). Raises ValueError for counts that cannot be.
    """
    if not 0 <= count <= total or not 0.0 < confidence < 1.0:
        raise ValueError(f"count = {count}, total = {total}, confidence = {confidence}: give 0 <= count <= total")
    if total == 0:
        return 0.0, 1.0
    z, share = normal_quantile(0.5 + confidence / 2), count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Exactly 0 and 1 at the ends, where rounding would leave a share outside its own interval.
    return 0.0 if count == 0 else max(0.0, middle - half), 1.0 if count == total else min(1.0, middle + half)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values in the order given: the false-discovery rate at which each would be declared (1995).

    Raises ValueError for a value outside [0, 1].
    """
    for p in p_values:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p = {p}: not a probability; give values from 0 to 1")
    adjusted, least = [0.0] * len(p_values), 1.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank in range(len(order), 0, -1):
        least = min(least, p_values[order[rank - 1]] * len(order) / rank)
        adjusted[order[rank - 1]] = least
    return adjusted


def mean_difference(mean_a: float, variance_a: float, mean_b: float, variance_b: float) -> float:
    """Standardised mean difference, (mean_b - mean_a) / sqrt((variance_a + variance_b) / 2).

    Infinite where both sides are constant and differ. Raises ValueError for a negative variance.
    """
    if variance_a < 0 or variance_b < 0:
        raise ValueError(f"variances = {variance_a}, {variance_b}: give none below 0")
    difference, deviation = mean_b - mean_a, math.sqrt((variance_a + variance_b) / 2)
    if difference == 0:
        return 0.0
    return difference / deviation if deviation > 0 else math.copysign(math.inf, difference)


def ks_p_value(distance: float, n_a: int, n_b: int) -> float:
    """P(D >= `distance`) of two samples of one continuous distribution, two-sided; conservative with ties.

    Exact for few values; else that of one sample of n_a n_b / (n_a + n_b) values, as scipy.stats.ks_2samp's "asymp";
    above 100,000 Kolmogorov's limit, where it has the same digits and scipy's kstwo becomes slow, and wrong near 1e10.
    Raises ValueError for a distance outside [0, 1] or an empty sample.
    """
    if not 0.0 <= distance <= 1.0 or n_a < 1 or n_b < 1:
        raise ValueError(f"D = {distance} of {n_a} and {n_b} values: give D from 0 to 1 and at least one value each")
    if n_a * n_b <= _LATTICE_UP_TO:
        return _lattice_p(round(distance * n_a * n_b), n_a, n_b)
    stats, effective = scipy_stats(), n_a / (n_a + n_b) * n_b
    if effective > _KSTWO_UP_TO:
        p = stats.kstwobign.sf(distance * math.sqrt(effective))
    else:
        p = stats.kstwo.sf(distance, max(1, round(effective)))
    return min(1.0, max(0.0, float(p)))


def _lattice_p(steps: int, n_a: int, n_b: int) -> float:
    """Share of the orders of n_a and n_b values in which |i/n_a - j/n_b| >= steps / (n_a n_b) at some point."""
    reached = [[0.0] * (n_b + 1) for _ in range(n_a + 1)]  # [i][j]: share of the paths to here that got there
    for i in range(n_a + 1):
        for j in range(n_b + 1):
            if abs(i * n_b - j * n_a) >= steps:
                reached[i][j] = 1.0
            elif i + j:
                before_a = i * reached[i - 1][j] if i else 0.0
                reached[i][j] = (before_a + (j * reached[i][j - 1] if j else 0.0)) / (i + j)
    return reached[n_a][n_b]


def chi_square(counts: Sequence[tuple[int, int]]) -> ChiSquare:
    """Test a k x 2 table for equal distributions of its two columns.

    Raises ValueError unless two rows and both columns hold something; rows of zeros are to be left out.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 2 or len(table) < 2 or (table < 0).any():
        raise ValueError(f"counts of shape {table.shape}: give at least two rows of two counts")
    rows, columns, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    if (rows == 0).any() or (columns == 0).any():
        raise ValueError(f"row sums {rows.tolist()}, column sums {columns.tolist()}: leave out rows of zeros")
    expected = rows[:, None] * columns / total
    statistic = float(((table - expected) ** 2 / expected).sum())
    shares = table / columns
    balanced = float(((shares[:, 0] - shares[:, 1]) ** 2 / shares.sum(axis=1)).sum() / 2)
    spread = np.sqrt(expected[:, 1] * (1 - rows / total) * (columns[0] / total))
    return ChiSquare(
        statistic,
        len(table) - 1,
        float(scipy_stats().chi2.sf(statistic, len(table) - 1)),
        min(1.0, math.sqrt(statistic / total)),
        min(1.0, math.sqrt(balanced)),
        ((table[:, 1] - expected[:, 1]) / spread).tolist(),
        float(expected.min()),
    )


def size_of_mean_difference(value: float) -> Size:
    """Plain word for a standardised mean difference (Cohen's d), whatever its sign."""
    return _word(abs(value), _D_LIMITS)


def size_of_association(value: float) -> Size:
    """Plain word for Cramer's V of a k x 2 table, which is Cohen's w."""
    return _word(abs(value), _W_LIMITS)


def size_of_distance(distance: float) -> Size:
    """Plain word for a Kolmogorov-Smirnov D: that of two normal distributions d apart, D = 2 Phi(d/2) - 1."""
    return _word(2 * normal_quantile((1 + distance) / 2) if distance < 1 else math.inf, _D_LIMITS)


def normal_quantile(probability: float) -> float:
    """z with Phi(z) = `probability`. Raises ValueError (StatisticsError) outside (0, 1)."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def scipy_stats() -> Any:
    """scipy.stats; raises ImportError that names the extra."""
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError("the audit needs scipy: pip install 'neuclip-scale[audit]'") from error
    return scipy.stats


def _word(value: float, limits: tuple[tuple[float, Size], ...]) -> Size:
    return next((word for limit, word in limits if value < limit), "large")
