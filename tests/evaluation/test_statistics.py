"""Statistics against printed tables, counting by hand and exact fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.evaluation.statistics import (
    EXACT_UP_TO,
    NUM_DRAWS,
    holm,
    mean_interval,
    regularised_incomplete_beta,
    sign_flip_name,
    sign_flip_p,
    smallest_sign_flip_p,
    student_t_quantile,
)

probabilities = st.lists(st.floats(0, 1), max_size=12)


# Abramowitz and Stegun, table 26.10.
@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.975, 120, 1.980),
        (0.95, 1, 6.314),
        (0.95, 5, 2.015),
        (0.995, 2, 9.925),
        (0.995, 10, 3.169),
        (0.999, 1, 318.309),
        (0.9, 7, 1.415),
    ],
)
def test_t_quantiles_of_printed_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, abs=6e-4)
    assert student_t_quantile(1 - probability, degrees) == pytest.approx(
        -expected, abs=6e-4 if expected < 100 else 4e-3
    )


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.9999])
def test_t_quantiles_in_closed_form(probability: float) -> None:
    assert student_t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-10)
    two = (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    assert student_t_quantile(probability, 2) == pytest.approx(two, rel=1e-10)


def test_t_tends_to_the_normal_distribution() -> None:
    assert student_t_quantile(0.975, 1e7) == pytest.approx(1.959964, abs=1e-5)


@given(st.floats(0.05, 0.95), st.integers(1, 12), st.integers(1, 12))
def test_incomplete_beta_is_a_binomial_tail(x: float, a: int, b: int) -> None:
    n = a + b - 1
    tail = math.fsum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert regularised_incomplete_beta(a, b, x) == pytest.approx(tail, rel=1e-9, abs=1e-12)


def test_interval_by_hand() -> None:
    # mean 5, s^2 = (9 + 1 + 1 + 9) / 3 = 20/3, half = 3.18245 sqrt(20/3) / 2
    estimate = mean_interval([2.0, 4.0, 6.0, 8.0])
    assert (estimate.n, estimate.mean) == (4, 5.0)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.high - estimate.mean == pytest.approx(3.182446 * math.sqrt(20 / 3) / 2, rel=1e-6)
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.25]) == (1, 0.25, None, None)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0], 1.0),
        ([1.0, 2.0], 2 / 4),
        ([1.0, 2.0, 3.0], 2 / 8),
        # |sum| >= 4 of {1, 2, -1 ...}: 3 + 2 - 1 = 4, reached by +++ and ---(6), ++- (4) and --+ (4).
        ([3.0, 2.0, -1.0], 4 / 8),
        ([0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, 0.3, -0.6], 1.0),
        ([1.0] * 5, 2 / 32),
        ([0.1] * 10, 2 / 1024),
    ],
)
def test_sign_flips_by_hand(differences: list[float], expected: float) -> None:
    assert sign_flip_p(differences) == pytest.approx(expected)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_sign_flips_against_exact_counting(numbers: list[int]) -> None:
    """Tenths as floats have rounding errors; counted in whole numbers there are none."""
    reached = [
        abs(sum(sign * number for sign, number in zip(signs, numbers))) >= abs(sum(numbers))
        for signs in itertools.product((1, -1), repeat=len(numbers))
    ]
    assert sign_flip_p([number / 10 for number in numbers]) == float(Fraction(sum(reached), len(reached)))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.randoms())
def test_sign_flips_do_not_depend_on_order_direction_or_unit(differences: list[float], random: object) -> None:
    p = sign_flip_p(differences)
    assert smallest_sign_flip_p(len(differences)) <= p <= 1
    assert sign_flip_p([-value for value in differences]) == p
    assert sign_flip_p([4 * value for value in differences]) == p


@settings(max_examples=10, deadline=None)
@given(st.integers(EXACT_UP_TO + 1, 20))
def test_drawn_sign_flips(n: int) -> None:
    assert sign_flip_p([1.0] * n) <= 2e-3
    assert sign_flip_p([1.0] * n) >= smallest_sign_flip_p(n) == 1 / (1 + NUM_DRAWS)
    assert sign_flip_p([1.0, -1.0] * 8, seed=3) == 1.0
    alternating = [1.0 + 0.1 * i * (-1) ** i for i in range(n)]
    assert sign_flip_p(alternating, seed=1) == sign_flip_p(alternating, seed=1)


def test_drawn_sign_flips_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.4, -0.1, 0.3, 0.25, -0.2, 0.15, 0.1, -0.05, 0.3, 0.05]
    exact = sign_flip_p(differences)
    monkeypatch.setattr("neuclip_scale.evaluation.statistics.EXACT_UP_TO", 2)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / NUM_DRAWS))


@pytest.mark.parametrize(
    ("n", "least"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 1 / 16), (12, 2 / 4096), (13, 2 / 8192), (16, 2 / 65536)]
)
def test_least_p(n: int, least: float) -> None:
    assert smallest_sign_flip_p(n) == least == sign_flip_p([1.0] * n)


def test_the_least_p_of_drawn_patterns_is_not_below_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuclip_scale.evaluation.statistics.EXACT_UP_TO", 4)
    assert (smallest_sign_flip_p(5), smallest_sign_flip_p(30)) == (1 / 16, 1 / (1 + NUM_DRAWS))


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ([], "exact sign-flip test"),
        ([3, EXACT_UP_TO], "exact sign-flip test"),
        ([EXACT_UP_TO + 1], "sign-flip test over 10,000 drawn sign patterns"),
        ([3, 40], "sign-flip test (exact up to n = 16, above over 10,000 drawn sign patterns)"),
    ],
)
def test_exact_is_said_only_where_it_is(sizes: list[int], name: str) -> None:
    assert sign_flip_name(sizes) == name


def test_holm_by_hand() -> None:
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1 lifted to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(probabilities)
def test_holm_lies_between_p_and_bonferroni(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values)):
        assert p <= adjusted <= min(1.0, len(p_values) * p)


@given(probabilities, st.randoms(use_true_random=False))
def test_holm_keeps_order_and_does_not_depend_on_it(p_values: list[float], random: object) -> None:
    adjusted = holm(p_values)
    pairs = sorted(zip(p_values, adjusted))
    assert [value for _, value in pairs] == sorted(adjusted)
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


@given(probabilities)
def test_holm_rejects_what_its_step_down_rule_rejects(p_values: list[float]) -> None:
    """Holm (1979): go through the sorted values and stop at the first above alpha / (m - i)."""
    alpha, rejected = 0.05, set()
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - place) * p_values[index] > alpha:
            break
        rejected.add(index)
    assert rejected == {index for index, p in enumerate(holm(p_values)) if p <= alpha}


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, math.nan]),
        lambda: mean_interval([1.0], confidence=1.0),
        lambda: sign_flip_p([]),
        lambda: sign_flip_p([math.inf]),
        lambda: smallest_sign_flip_p(0),
        lambda: holm([0.5, 1.5]),
        lambda: holm([math.nan]),
        lambda: student_t_quantile(1.0, 3),
        lambda: student_t_quantile(0.9, 0),
        lambda: regularised_incomplete_beta(0.0, 1.0, 0.5),
    ],
)
def test_bad_values_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="give"):
        call()  # type: ignore[operator]
