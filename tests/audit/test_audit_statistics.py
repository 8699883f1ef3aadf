"""The audit's statistics against scipy's, on random and on extreme data."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.audit.statistics import (
    benjamini_hochberg,
    chi_square,
    ks_p_value,
    mean_difference,
    size_of_association,
    size_of_distance,
    size_of_mean_difference,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats", reason="needs the extra `audit`")
probabilities = st.floats(0, 1, allow_nan=False)


@given(st.integers(0, 10**10), st.integers(1, 10**10), st.sampled_from([0.5, 0.95, 0.999]))
def test_wilson_is_scipys(count: int, total: int, confidence: float) -> None:
    count = min(count, total)
    low, high = wilson_interval(count, total, confidence)
    expected = stats.binomtest(count, total).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= count / total <= high <= 1


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="count = 3, total = 2"):
        wilson_interval(3, 2)


@given(st.lists(probabilities, max_size=40))
def test_q_values_are_scipys(p_values: list[float]) -> None:
    expected = stats.false_discovery_control(p_values) if p_values else []
    assert benjamini_hochberg(p_values) == pytest.approx(list(expected), abs=1e-15)


def test_a_p_value_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="p = nan"):
        benjamini_hochberg([0.1, math.nan])


def test_the_mean_difference_by_hand() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([3.0, 5, 9])
    found = mean_difference(a.mean(), a.var(ddof=1), b.mean(), b.var(ddof=1))
    assert found == pytest.approx((17 / 3 - 2.5) / math.sqrt((5 / 3 + 28 / 3) / 2))
    assert mean_difference(1, 0, 1, 0) == 0
    assert mean_difference(1, 0, 2, 0) == math.inf
    assert mean_difference(2, 0, 1, 0) == -math.inf
    with pytest.raises(ValueError, match="-1"):
        mean_difference(1, -1, 1, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 400), st.floats(0, 1))
def test_ks_p_is_scipys(seed: int, n_a: int, n_b: int, shift: float) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=n_a), random.normal(shift, size=n_b)
    few = n_a * n_b <= 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, about a handful of values
        expected = stats.ks_2samp(a, b, method="exact" if few else "asymp")
    assert ks_p_value(expected.statistic, n_a, n_b) == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)


def test_ks_p_of_many_values_is_kolmogorovs_limit_and_joins_without_a_jump() -> None:
    for root in (0.8, 1.36, 2.0):  # D sqrt(n)
        near = [ks_p_value(root / math.sqrt(n / 2), n, n) for n in (199_000, 201_000)]
        assert near[0] == pytest.approx(near[1], rel=0.01)
        for n in (10**8, 2 * 10**10):
            assert ks_p_value(root / math.sqrt(n / 2), n, n) == pytest.approx(stats.kstwobign.sf(root), rel=1e-6)
    assert ks_p_value(0.0, 10**10, 5) == 1
    assert ks_p_value(1.0, 10**10, 10**10) == 0
    with pytest.raises(ValueError, match=r"D = 1\.5"):
        ks_p_value(1.5, 3, 3)


counts = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).filter(any), min_size=2, max_size=12)


@given(counts.filter(lambda rows: all(sum(column) for column in zip(*rows))))
def test_chi_square_is_scipys(rows: list[tuple[int, int]]) -> None:
    found = chi_square(rows)
    expected = stats.chi2_contingency(rows, correction=False)
    association = stats.contingency.association(np.array(rows), method="cramer")
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-9, abs=1e-9)
    assert (found.degrees, found.p) == (expected.dof, pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300))
    assert found.cramers_v == pytest.approx(association, abs=1e-7)
    assert found.smallest_expected == pytest.approx(expected.expected_freq.min())
    balanced = np.array([(a * sum(r[1] for r in rows), b * sum(r[0] for r in rows)) for a, b in rows], dtype=float)
    assert found.balanced_v == pytest.approx(
        stats.contingency.association(balanced.astype(int), method="cramer"), abs=1e-6
    )


def test_residuals_are_standard_normal_without_a_difference() -> None:
    random = np.random.default_rng(0)
    shares = [0.5, 0.3, 0.2]
    draws = [
        chi_square(
            list(zip(random.multinomial(900, shares).tolist(), random.multinomial(300, shares).tolist()))
        ).residuals
        for _ in range(2000)
    ]
    assert np.mean(draws, axis=0) == pytest.approx([0, 0, 0], abs=0.1)
    assert np.std(draws, axis=0) == pytest.approx([1, 1, 1], abs=0.06)
    assert chi_square([(10, 30), (30, 10)]).residuals[0] > 4, "more of the first row in the second column"


def test_tables_without_a_test_are_refused() -> None:
    for rows in ([(1, 2)], [(0, 0), (1, 2)], [(1, 0), (2, 0)]):
        with pytest.raises(ValueError, match=r"rows|row sums"):
            chi_square(rows)


def test_sizes_have_words() -> None:
    words = ["negligible", "very small", "small", "medium", "large"]
    assert [size_of_mean_difference(value) for value in (0.09, -0.1, 0.2, -0.5, math.inf)] == words
    assert [size_of_association(value) for value in (0.049, 0.05, 0.1, 0.3, 0.5)] == words
    # Two normal distributions d apart have D = 2 Phi(d/2) - 1.
    assert [size_of_distance(2 * stats.norm.cdf(d / 2) - 1) for d in (0.09, 0.11, 0.21, 0.51, 0.81)] == words
    assert size_of_distance(1.0) == "large"
