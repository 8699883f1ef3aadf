"""Means, intervals and paired tests over seeds, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from comparison_helpers import evaluation, write_run

from neuclip_scale.comparison import compare_runs, read_runs
from neuclip_scale.comparison.arms import group_arms
from neuclip_scale.comparison.metrics import MetricComparison, compare_metrics
from neuclip_scale.comparison.scores import Metric
from neuclip_scale.comparison.sections import sections

SIZES = ["retrieval: 100 pictures, 100 texts.", "zeroshot: 30 pictures, 10 classes."]
TOP1 = Metric("zeroshot", "top-1")


def compared(folder: Path, scores: dict[str, dict[int, float]]) -> MetricComparison:
    """`scores`: objective -> seed -> top-1."""
    paths = [
        write_run(folder / f"{name}-{seed}", seed=seed, objective__name=name, scores=evaluation(top1))
        for name, of in scores.items()
        for seed, top1 in of.items()
    ]
    return compare_metrics(group_arms(read_runs(paths)))


def test_three_seeds_by_hand(tmp_path: Path) -> None:
    metrics = compared(
        tmp_path, {"openclip": {0: 0.40, 1: 0.50, 2: 0.60}, "neuclip": {2: 0.63, 0: 0.41, 1: 0.52, 7: 0.9}}
    )
    row = next(row for row in metrics.rows if row.metric == TOP1)
    assert (row.chance, row.majority) == (0.1, 0.2)
    mean = row.arms["openclip"]
    # s = 0.1, t(2) = 4.302653, half = 4.302653 * 0.1 / sqrt(3)
    assert (mean.n, mean.mean) == (3, pytest.approx(0.5))
    assert mean.high == pytest.approx(0.5 + 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert row.arms["neuclip"].n == 4
    pair = next(pair for pair in metrics.pairs if pair.metric == TOP1)
    assert (pair.first, pair.second, pair.seeds) == ("openclip", "neuclip", ["0", "1", "2"])
    assert pair.differences == pytest.approx([0.01, 0.02, 0.03])
    assert pair.estimate.mean == pytest.approx(0.02)
    assert pair.estimate.low == pytest.approx(0.02 - 4.302653 * 0.01 / math.sqrt(3), abs=1e-6)
    assert (pair.p, pair.smallest_p) == (0.25, 0.25)
    # Nine metrics; two have p = 0.25, so both become 9 * 0.25, at most 1.
    assert (len(metrics.pairs), pair.p_holm) == (9, 1.0)
    assert metrics.notes == [
        *SIZES,
        "With 3 common seeds the smallest p that can be reached is 0.25 (2/2^3), and 1 after Holm's correction over "
        "9 metrics: no difference, however large, comes below 0.05. That is not a sign of no difference. "
        "Read the intervals.",
    ]


def test_holm_is_over_the_metrics_of_a_pair(tmp_path: Path) -> None:
    seeds = range(9)
    first, second = ({seed: 0.3 + 0.01 * seed + shift for seed in seeds} for shift in (0.0, 0.1))
    metrics = compared(tmp_path, {"openclip": first, "neuclip": second})
    pair = next(pair for pair in metrics.pairs if pair.metric == TOP1)
    assert pair.p == 2 / 2**9
    assert pair.p_holm == pytest.approx(9 * pair.p)
    assert metrics.notes[2].endswith("and 0.035 after Holm's correction over 9 metrics. Read the intervals.")
    unchanged = next(pair for pair in metrics.pairs if pair.metric.label == "top-5")
    assert (unchanged.p, unchanged.p_holm, unchanged.estimate.mean) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("num_seeds", "how", "test"),
    [
        (3, "(2/2^3)", "p: exact sign-flip test of"),
        (17, "(by the number of draws)", "p: sign-flip test over 10,000 drawn"),
    ],
)
def test_a_test_is_called_exact_where_all_patterns_are_tried(
    tmp_path: Path, num_seeds: int, how: str, test: str
) -> None:
    paths = [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, objective__name=name)
        for name in ("openclip", "neuclip")
        for seed in range(num_seeds)
    ]
    (lines,) = (part.lines for part in sections(compare_runs(read_runs(paths))) if part.title == "Metrics")
    assert any(how in line for line in lines)
    assert lines[-1].startswith(test)


def test_one_seed_has_no_interval_and_no_test(tmp_path: Path) -> None:
    metrics = compared(tmp_path, {"openclip": {0: 0.4}, "neuclip": {0: 0.5}})
    assert metrics.pairs == []
    assert metrics.rows[0].arms["openclip"].low is None
    assert metrics.notes[2].startswith("One seed only, so no interval: openclip, neuclip.")
    assert metrics.notes[3] == "openclip and neuclip: fewer than two common seeds, so no test of their difference."


def test_seeds_must_be_common(tmp_path: Path) -> None:
    metrics = compared(tmp_path, {"openclip": {0: 0.4, 1: 0.5}, "neuclip": {1: 0.5, 2: 0.6}})
    assert metrics.pairs == []
    assert metrics.notes == [
        *SIZES,
        "openclip and neuclip: fewer than two common seeds, so no test of their difference.",
    ]


def test_runs_of_one_seed_count_once(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / str(number), seed=min(number, 1), scores=evaluation(top1))
        for number, top1 in enumerate((0.2, 0.4, 0.6))
    ]
    metrics = compare_metrics(group_arms(read_runs(paths)))
    mean = next(row for row in metrics.rows if row.metric == TOP1).arms["neuclip"]
    assert (mean.n, mean.mean) == (2, pytest.approx((0.2 + 0.5) / 2))
    assert metrics.notes == [*SIZES, "neuclip: 1, 2 have the same seed 1; their mean counts as one value."]


def test_sets_of_another_size_are_other_metrics(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", seed=0),
        write_run(tmp_path / "b", seed=1, scores=evaluation(num_pictures=31)),
    ]
    metrics = compare_metrics(group_arms(read_runs(paths)))
    names = [row.metric.set_name for row in metrics.rows if row.metric.label == "top-5"]
    assert names == ["zeroshot", "zeroshot (version 2)"]
    assert metrics.discrepancies == [
        "Evaluation set zeroshot is not the same for all (a; b): scores stand in separate rows."
    ]


def test_sets_with_other_prompts_are_other_metrics(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(count), seed=count, scores=evaluation(num_templates=count)) for count in (1, 80)]
    metrics = compare_metrics(group_arms(read_runs(paths)))
    assert [row.metric.set_name for row in metrics.rows if row.metric.label == "top-1"] == [
        "zeroshot",
        "zeroshot (version 2)",
    ]


def test_a_score_that_is_not_finite_makes_no_other_set(tmp_path: Path) -> None:
    """Its run's other scores of the set are paired as they are."""
    paths = [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, objective__name=name, scores=evaluation(**changes))
        for name in ("openclip", "neuclip")
        for seed in (0, 1)
        for changes in [{"top1": math.nan} if (name, seed) == ("neuclip", 1) else {}]
    ]
    metrics = compare_metrics(group_arms(read_runs(paths)))
    # A mean over classes is the same in this helper, so both of one run are NaN.
    assert metrics.discrepancies == [
        f"neuclip-1: summary.json, zeroshot, {label} = NaN, chance 0.1: not finite numbers; left out."
        for label in ("top-1", "class recall")
    ]
    assert {row.metric.set_name for row in metrics.rows} == {"retrieval", "zeroshot"}
    (pair,) = (pair for pair in metrics.pairs if pair.metric == Metric("zeroshot", "top-5"))
    assert pair.seeds == ["0", "1"]


def test_a_set_that_some_were_not_evaluated_on(tmp_path: Path) -> None:
    scores = evaluation()
    del scores["zeroshot"]
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, scores=scores)]
    metrics = compare_metrics(group_arms(read_runs(paths)))
    assert metrics.discrepancies == ["Evaluation set zeroshot: no scores of b."]


def test_scores_that_are_none_are_left_out_and_named(tmp_path: Path) -> None:
    scores = evaluation(top1="NaN", top5=None, mean_per_class_recall=10**400)  # type: ignore[arg-type]
    scores |= {"torn": {"task": "zeroshot"}, "odd": [], "strange": {"task": "zeroshot", "num_pictures": "x"}}
    metrics = compare_metrics(group_arms(read_runs([write_run(tmp_path / "a", scores=scores)])))
    assert {row.metric.set_name for row in metrics.rows} == {"retrieval"}
    assert len(metrics.discrepancies) == 6
    for text in ("top-1 = NaN", "evaluation torn: cannot be read", "evaluation odd"):
        assert any(text in problem for problem in metrics.discrepancies)
