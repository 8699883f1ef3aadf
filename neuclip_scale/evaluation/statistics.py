"""Statistics for few seeds: Student's t interval, the sign-flip test, and Holm's correction. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

EXACT_UP_TO = 16
"""Up to this many differences every one of the 2^n sign patterns is tried."""

NUM_DRAWS = 10_000
"""Sign patterns drawn where there are too many to try them all."""

# Sums that are equal in real numbers differ by rounding; a tie must count as one.
_TIE = 1e-12


class Estimate(NamedTuple):
    """A mean with the limits of its interval, in the unit of the values; None where one value gives no interval."""

    n: int
    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of `values` with Student's t interval, mean +- t(n - 1) s / sqrt(n).

    It takes the values for independent draws from a normal distribution. Raises ValueError for no value, one that
    is not finite, or a `confidence` outside (0, 1).
    """
    data = _finite(values)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence = {confidence}: not between 0 and 1; give 0.95, say")
    mean = float(data.mean())
    if len(data) == 1:
        return Estimate(1, mean, None, None)
    deviation = float(data.std(ddof=1))
    half = student_t_quantile(0.5 + confidence / 2, len(data) - 1) * deviation / math.sqrt(len(data))
    return Estimate(len(data), mean, mean - half, mean + half)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the hypothesis that each paired difference is as likely to have the other sign.

    The share of sign patterns whose |sum| is at least the observed one. Exact, over all 2^n patterns, for n up to
    `EXACT_UP_TO`; above, over `NUM_DRAWS` patterns drawn with `seed`, the observed one counted among them
    (Phipson and Smyth, 2010, so that it is never 0). Raises ValueError for no difference or one that is not finite.
    """
    data = _finite(differences)
    observed, tie = abs(float(data.sum())), _TIE * float(np.abs(data).sum())
    if len(data) <= EXACT_UP_TO:
        patterns = np.arange(2 ** len(data))[:, None] >> np.arange(len(data))  # [2^n, n]
        sums = np.abs((1 - 2 * (patterns & 1)) @ data)
        return float((sums >= observed - tie).mean())
    signs = np.random.default_rng(seed).integers(0, 2, (NUM_DRAWS, len(data))) * 2 - 1
    reached = int((np.abs(signs @ data) >= observed - tie).sum())
    return (1 + reached) / (1 + NUM_DRAWS)


def smallest_sign_flip_p(n: int) -> float:
    """The least p that `sign_flip_p` can give for `n` differences.

    2/2^n, as a pattern and its opposite tie; where patterns are drawn, no less than 1 of those and the observed one.
    Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: there is no test without a difference; give at least 1")
    exact = 2.0 ** (1 - n)
    return exact if n <= EXACT_UP_TO else max(exact, 1.0 / (1 + NUM_DRAWS))


def sign_flip_name(sizes: Collection[int]) -> str:
    """What to call `sign_flip_p` of so many differences each, as in `p by the ...`."""
    drawn = f"{NUM_DRAWS:,} drawn sign patterns"
    if max(sizes, default=0) <= EXACT_UP_TO:
        return "exact sign-flip test"
    if min(sizes) > EXACT_UP_TO:
        return f"sign-flip test over {drawn}"
    return f"sign-flip test (exact up to n = {EXACT_UP_TO}, above over {drawn})"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given, that control the family-wise error (Holm, 1979).

    The i-th smallest of m becomes the largest of (m - j + 1) p_(j) over j <= i, at most 1. Raises ValueError for a
    value outside [0, 1].
    """
    for p in p_values:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p = {p}: not a probability; give values from 0 to 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def student_t_quantile(probability: float, degrees: float) -> float:
    """t with P(T <= t) = `probability` for `degrees` of freedom, to about 12 digits.

    Found by halving, since P(|T| > t) = I_x(degrees/2, 1/2) with x = degrees / (degrees + t^2) falls with t.
    Raises ValueError for a probability outside (0, 1) or degrees that are not above 0.
    """
    if not 0.0 < probability < 1.0 or not 0.0 < degrees < math.inf:
        raise ValueError(f"probability = {probability}, degrees = {degrees}: give one in (0, 1), and one above 0")
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -student_t_quantile(1.0 - probability, degrees)
    both_tails = 2.0 * (1.0 - probability)
    low, high = 0.0, 1.0
    while _both_tails(high, degrees) > both_tails:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _both_tails(middle, degrees) > both_tails else (low, middle)
    return 0.5 * (low + high)


def regularised_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction (DLMF 8.17.22). Raises ValueError unless a, b > 0 and x is in [0, 1]."""
    if not (a > 0.0 and b > 0.0 and 0.0 <= x <= 1.0):
        raise ValueError(f"a = {a}, b = {b}, x = {x}: give a and b above 0, and x from 0 to 1")
    if x in (0.0, 1.0):
        return x
    # The fraction converges fast on the left of the mean only; the other side is its mirror image.
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - regularised_incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _beta_fraction(a, b, x) / a


def _both_tails(t: float, degrees: float) -> float:
    return regularised_incomplete_beta(0.5 * degrees, 0.5, degrees / (degrees + t * t))


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 / (1 + d1/(1 + d2/(1 + ...))), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0), tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d, tiny)
            c = _away_from_zero(1.0 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _finite(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise ValueError(f"values = {list(values)!r}: give at least one, all finite")
    return data
