"""Bounds on what seeds and data explain of a gain: published figures, monotone in what they should be, edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip_scale.audit.effect import Assumptions, Downloads, effective_pairs, judge_gain, noise_limit
from neuclip_scale.audit.effect_sources import largest_filter_gain, points_per_doubling, points_per_share
from neuclip_scale.audit.mattering import Claim, effect_of
from neuclip_scale.audit.pairs import Pair

CC12M = Downloads(first=9_187_328, second=8_059_642, common=8_059_642)
SEEN = 33 * 9_187_328
pairs = st.integers(1, 10**11)


@st.composite
def downloads(draw: Any) -> Downloads:
    first, second = draw(pairs), draw(pairs)
    return Downloads(first=first, second=second, common=draw(st.integers(0, min(first, second))))


gains = st.floats(-50, 50)


def test_figures_come_from_the_published_table() -> None:
    # Image-based and CLIP score, medium to large: .328 -> .537 and .297 -> .631 for ten times the pairs.
    assert points_per_doubling("average").value == pytest.approx(20.9 / math.log2(10))
    assert points_per_doubling("imagenet").value == pytest.approx(33.4 / math.log2(10))
    # CLIP score, large: .437 -> .529 by removing 70 %; with images .459 -> .631 by removing 89 %.
    assert points_per_share("average").value == pytest.approx(9.2 / 0.7)
    assert points_per_share("imagenet").value == pytest.approx(17.2 / (1 - 140 / 1280))
    assert largest_filter_gain("average").value == pytest.approx(10.0)
    assert "large" in points_per_share("average").source


def test_two_downloads_of_cc12m_by_hand() -> None:
    """NeuCLIP's 31.89 against AmorLIP's 29.86, whose download has 12.3 % fewer pairs."""
    found = judge_gain(2.03, CC12M, samples_seen=SEEN)
    assert found.noise_limit == pytest.approx(1.95996 * 0.6 * math.sqrt(2), rel=1e-4)
    assert found.quantity == pytest.approx(20.9 / math.log2(10) * math.log2(9_187_328 / 8_059_642))
    assert found.selection == pytest.approx(9.2 / 0.7 * (1 - 8_059_642 / 9_187_328))
    assert found.quantity_by_repeats is not None
    assert 0 < found.quantity_by_repeats < found.quantity
    assert found.verdict == "could be explained by the data difference"
    assert found.sentence.startswith(
        "Of the difference of +2.03 points on the 38-task average, seeds alone make up to 1.66"
    )
    assert found.sentence.endswith("the difference could be explained by the data difference.")
    assert any("language models" in text for text in found.assumptions)
    assert found.document()["jaccard"] == pytest.approx(0.8773, abs=1e-4)


def test_the_three_verdicts() -> None:
    said = [judge_gain(gain, CC12M, samples_seen=SEEN).verdict for gain in (1.6, 1.7, 4.4, 4.6)]
    data, none = "could be explained by the data difference", "not explained under the assumptions"
    assert said == ["no larger than seed noise", data, data, none]
    found = judge_gain(4.6, CC12M)
    assert "only pairs that held the whole effect" in found.sentence
    assert "only pairs that held" not in judge_gain(40, CC12M).sentence
    at_random = Assumptions(points_per_share=0)
    assert judge_gain(3.0, CC12M, assumptions=at_random).verdict == none


@given(gains)
def test_equal_downloads_leave_seeds_only(gain: float) -> None:
    same = Downloads(first=1000, second=1000, common=1000)
    found = judge_gain(gain, same, samples_seen=10**6)
    assert (found.quantity, found.quantity_by_repeats, found.selection, found.selection_ceiling) == (0, 0, 0, 0)
    assert found.explainable == found.noise_limit
    assert found.verdict != "could be explained by the data difference"


@given(downloads())
def test_no_gain_needs_no_explanation(both: Downloads) -> None:
    silent = Assumptions(seed_deviation=0, points_per_doubling=0, points_per_share=0)
    assert judge_gain(0.0, both, assumptions=silent).verdict == "no larger than seed noise"


def test_disjoint_downloads_are_as_different_as_two_filters() -> None:
    found = judge_gain(1.0, Downloads(first=500, second=700, common=0))
    assert found.downloads.jaccard == 0
    assert found.selection == found.selection_ceiling == pytest.approx(20.0)
    assert found.quantity == 0, "the better side has fewer pairs, which explains nothing"
    assert judge_gain(-1.0, found.downloads).quantity > 0


@given(gains, downloads(), st.integers(1, 10**12))
def test_bounds_are_ordered_and_sides_can_be_swapped(gain: float, both: Downloads, seen: int) -> None:
    found = judge_gain(gain, both, samples_seen=seen)
    assert found.quantity_by_repeats is not None
    assert 0 <= found.quantity_by_repeats <= found.quantity + 1e-9
    assert 0 <= found.selection <= found.selection_ceiling + 1e-9
    if gain:
        swapped = Downloads(first=both.second, second=both.first, common=both.common)
        other = judge_gain(-gain, swapped, samples_seen=seen)
        assert (other.verdict, other.selection) == (found.verdict, pytest.approx(found.selection))
        assert other.quantity == pytest.approx(found.quantity)


def test_without_a_claim_numbers_stay_with_their_download() -> None:
    smaller = Pair("a", "b", common=30, only_first=0, only_second=5, jaccard=30 / 35, unequal_share=1 / 7)
    larger = Pair("b", "a", common=30, only_first=5, only_second=0, jaccard=30 / 35, unequal_share=1 / 7)
    found, other = effect_of(smaller, Claim()), effect_of(larger, Claim())
    assert found
    assert other
    assert found["downloads"] == {"first": 30, "second": 35, "common": 30}
    assert other["downloads"] == {"first": 35, "second": 30, "common": 30}
    assert found["quantity"] == other["quantity"] > 0


@given(downloads(), st.floats(0, 30), st.floats(0, 30))
def test_a_larger_gain_is_never_easier_to_explain(both: Downloads, one: float, other: float) -> None:
    order = [
        "no larger than seed noise", "could be explained by the data difference", "not explained under the assumptions",
    ]  # fmt: skip
    small, large = sorted((one, other))
    assert order.index(judge_gain(small, both).verdict) <= order.index(judge_gain(large, both).verdict)


@given(downloads(), st.data())
def test_more_in_common_explains_no_more(both: Downloads, data: st.DataObject) -> None:
    common = data.draw(st.integers(both.common, min(both.first, both.second)))
    closer = Downloads(first=both.first, second=both.second, common=common)
    assert judge_gain(1.0, closer).explainable <= judge_gain(1.0, both).explainable + 1e-9


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**9))
def test_repeats_are_worth_less_than_new_pairs_and_more_than_nothing(one: int, other: int, seen: int) -> None:
    small, large = sorted((one, other))
    assert min(small, seen) <= effective_pairs(small, seen) <= seen * (1 + 1e-12)
    assert effective_pairs(small, seen) <= effective_pairs(large, seen) * (1 + 1e-12)
    assert effective_pairs(small, seen) <= effective_pairs(small, seen + 1) * (1 + 1e-12)
    assert effective_pairs(small, 10**12) <= small * (1 + 15.4)


def test_few_repeats_are_nearly_new() -> None:
    assert effective_pairs(1000, 1000) == 1000
    assert effective_pairs(1000, 300) == 300
    assert effective_pairs(1000, 4000) == pytest.approx(1000 + 15387.756 * (1 - math.exp(-3 / 15.387756)))
    assert effective_pairs(1000, 4000) > 0.9 * 4000, "four epochs are nearly as good (Muennighoff et al.)"
    with pytest.raises(ValueError, match="unique = 0"):
        effective_pairs(0, 1)


def test_measured_noise_is_welchs() -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the extra `audit`")
    first, second = [39.2, 39.5, 38.8], [38.1, 38.9, 38.4, 38.6]
    gain = sum(first) / 3 - sum(second) / 4
    found = judge_gain(gain, CC12M, first_scores=first, second_scores=second)
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (gain - found.noise_limit, gain + found.noise_limit) == pytest.approx((interval.low, interval.high))
    assert "Welch" in found.assumptions[0]
    one_side = judge_gain(39.1 - 38.5, CC12M, first_scores=first, second_scores=[38.5666])
    assert one_side.noise_limit == pytest.approx(stats.t.ppf(0.975, 2) * 0.3511884 * math.sqrt(1 / 3 + 1), rel=1e-5)
    equal = judge_gain(1.0, CC12M, first_scores=[2.0, 2.0], second_scores=[1.0, 1.0])
    assert equal.noise_limit == 0


@given(st.floats(0, 5), st.floats(0, 5), st.integers(1, 9), st.integers(1, 9))
def test_more_seeds_and_less_confidence_leave_less_noise(one: float, other: float, first: int, second: int) -> None:
    limit = noise_limit((one, other), (first, second), math.inf, 0.95)
    assert noise_limit((one, other), (first + 1, second), math.inf, 0.95) <= limit
    assert (
        noise_limit((one, other), (first, second), math.inf, 0.8)
        <= limit
        <= noise_limit((one, other), (first, second), 3, 0.95)
    )


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="common = 11"):
        Downloads(first=10, second=20, common=11)
    with pytest.raises(ValueError, match="at least one pair"):
        Downloads(first=0, second=20, common=0)
    with pytest.raises(ValueError, match="points_per_share = -1"):
        Assumptions(points_per_share=-1)
    with pytest.raises(ValueError, match="confidence = 95"):
        Assumptions(confidence=95)
    with pytest.raises(ValueError, match="gain = nan"):
        judge_gain(math.nan, CC12M)
    with pytest.raises(ValueError, match="mean scores differ by"):
        judge_gain(2.0, CC12M, first_scores=[0.39, 0.38], second_scores=[0.38, 0.37])
