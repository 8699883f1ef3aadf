"""Metrics against scikit-learn, WILDS' published formulas in plain NumPy, and counting by hand."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from neuclip_scale.evaluation.datacomp.metrics import (
    classification_metrics,
    group_metrics,
    jaccard_metrics,
    jaccard_score,
    macro_f1,
    macro_recall,
)
from neuclip_scale.evaluation.datacomp.tasks import Task, WorstGroup, select_tasks

answers = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), min_size=1, max_size=40)
grouped = st.lists(st.tuples(st.booleans(), st.sampled_from([0, 1, 2, 5, 9])), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(answers)
def test_macro_scores_against_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = np.array(pairs).T
    present = np.unique(labels)
    # WILDS: sklearn with labels = the classes in y_true. Classes 7 and 8 are answered and never right.
    expected = sk.f1_score(labels, predicted, average="macro", labels=present, zero_division=0)
    assert macro_f1(labels, predicted) == pytest.approx(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of classes that are answered only
        assert macro_recall(labels, predicted) == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    recall = sk.recall_score(labels, predicted, average="macro", labels=present, zero_division=0)
    assert macro_recall(labels, predicted) == pytest.approx(recall)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4, 6, 9]), st.integers(1, 30), st.integers(0, 1000))
def test_accuracies_against_scikit_learn(num_classes: int, num_samples: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_samples)
    scores = random.permuted(np.tile(np.arange(num_classes, dtype=float), (num_samples, 1)), axis=1)
    mine = scores[np.arange(num_samples), labels]
    ranks = (scores > mine[:, None]).sum(1)
    (task,) = select_tasks(["cifar10"])
    nothing = np.empty((num_samples, 0), int)
    found = classification_metrics(task, ranks, labels, scores.argmax(1), nothing, num_classes)
    assert found["acc1"] == pytest.approx(sk.accuracy_score(labels, scores.argmax(1)))
    if num_classes < 5:
        assert found["acc5"] is None
    else:
        top = sk.top_k_accuracy_score(labels, scores, k=5, labels=np.arange(num_classes))
        assert found["acc5"] == pytest.approx(top)


def wilds_group_accuracies(right: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """WILDS: groups from 0 to the largest number, averages by scattered sums, empty groups with count 0."""
    num_groups = int(groups.max()) + 1
    counts, sums = np.zeros(num_groups), np.zeros(num_groups)
    np.add.at(counts, groups, 1)
    np.add.at(sums, groups, right)
    with np.errstate(invalid="ignore"):
        return sums / counts, counts


@settings(max_examples=60, deadline=None)
@given(grouped)
def test_worst_group_against_wilds_formula(pairs: list[tuple[bool, int]]) -> None:
    right, groups = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    averages, counts = wilds_group_accuracies(right, groups)
    found = group_metrics(WorstGroup(name="acc_wg", score="acc", column="region"), right, groups)
    assert found["acc_wg"] == pytest.approx(averages[counts > 0].min())
    assert found["acc_avg"] == pytest.approx(right.mean())
    for number in np.flatnonzero(counts):
        assert found[f"acc_region:{number}"] == pytest.approx(averages[number])
        assert found[f"count_region:{number}"] == counts[number]
    without = WorstGroup(name="w", score="acc", column="region", without=5)
    kept = [averages[n] for n in np.flatnonzero(counts) if n != 5]
    assert group_metrics(without, right, groups)["w"] == (pytest.approx(min(kept)) if kept else None)


def test_each_task_with_groups_takes_its_own_columns() -> None:
    ranks, labels = np.array([0, 3, 0, 7, 0, 0]), np.zeros(6, int)
    predicted = np.array([0, 1, 0, 1, 0, 0])
    groups = {"region": np.array([0, 0, 1, 1, 5, 5]), "year": np.array([2, 2, 2, 3, 3, 3])}
    fmow, street, geode, camelyon, iwildcam = (
        select_tasks([name])[0] for name in ("FMoW", "Dollar Street", "GeoDE", "Camelyon17", "iWildCam")
    )

    def run(task: Task, *columns: np.ndarray) -> dict[str, float | int | None]:
        table = np.stack(columns, axis=1) if columns else np.empty((6, 0), int)
        return classification_metrics(task, ranks, labels, predicted, table, 62)

    found = run(fmow, groups["region"], groups["year"])
    assert fmow.group_columns == (0, 1)
    assert (found["acc_worst_region"], found["acc_worst_year"]) == (0.5, pytest.approx(2 / 3))
    only_other_missed = classification_metrics(
        fmow, np.array([0, 9]), labels[:2], predicted[:2], np.array([[0, 0], [5, 0]]), 62
    )
    assert (only_other_missed["acc_worst_region"], only_other_missed["acc_worst_region_without_other"]) == (0.0, 1.0)
    # Top-5: rank 3 is right, rank 7 is not.
    found = run(street, groups["region"])
    assert (found["acc_top5_wg"], found["acc_top5_avg"]) == (0.5, pytest.approx(5 / 6))
    assert found["acc_top5_income_ds:0"] == 1.0
    assert run(geode, groups["region"])["acc_wg"] == 0.5
    assert camelyon.group_columns == (1,)
    assert run(camelyon, groups["year"])["acc_slide:3"] == pytest.approx(2 / 3)
    found = run(iwildcam)
    assert found["F1-macro_all"] == pytest.approx(2 * 4 / (6 + 4))
    assert "acc_wg" not in found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_jaccard_against_scikit_learn(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    right = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any)))
    scores = np.array(data.draw(st.permutations(range(size)))) / 16
    chosen = np.isin(np.arange(size), np.argsort(scores)[-right.sum() :])
    assert jaccard_score(scores, right) == pytest.approx(sk.jaccard_score(right, chosen))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_jaccard_with_ties_is_the_worst_order_of_them(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 5))
    right = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any)))
    scores = np.array(data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=size, max_size=size)))
    worst = 1.0
    for order in itertools.permutations(range(size)):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            chosen, wanted = set(order[: right.sum()]), set(np.flatnonzero(right))
            worst = min(worst, len(chosen & wanted) / len(chosen | wanted))
    assert jaccard_score(scores, right) == pytest.approx(worst)


def test_not_a_number_is_not_right() -> None:
    assert jaccard_score(np.array([np.nan, 0.1, 0.9]), np.array([True, False, False])) == 0.0
    assert jaccard_score(np.array([np.nan, 0.9, 0.1]), np.array([False, True, False])) == 0.0


def test_jaccard_means_by_number_of_candidates() -> None:
    found = jaccard_metrics([1.0, 0.0, 0.5, 0.25], [5, 6, 10, 10])
    assert found["avg_jaccard_score"] == pytest.approx(0.4375)
    assert (found["jaccard_score_5"], found["jaccard_score_5-6"], found["jaccard_score_10"]) == (1.0, 0.5, 0.375)
    assert found["jaccard_score_10-12"] == 0.375
    assert found["jaccard_score_12"] is None
