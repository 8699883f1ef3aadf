"""The tasks' metrics, from arrays of answers; named as in DataComp's result files. No torch.

A tie is lost everywhere: a class that scores as high as the right one comes before it, so that a model which sees
nothing gets nothing. DataComp's own code breaks ties by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neuclip_scale.evaluation.datacomp.tasks import Task, WorstGroup

TIE = 1e-6
"""Cosines closer than this are a tie."""

Metrics = dict[str, float | int | None]


def classification_metrics(
    task: Task, ranks: np.ndarray, labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, num_classes: int
) -> Metrics:
    """Everything that is reported of a classification task.

    `ranks`, `labels` and `predicted` are int64 [N], `groups` int64 [N, len(task.group_columns)].
    """
    in_five = ranks < 5
    metrics: Metrics = {
        "acc1": _mean(ranks < 1),
        "acc5": _mean(in_five) if num_classes >= 5 else None,
        "mean_per_class_recall": macro_recall(labels, predicted),
    }
    if task.macro:
        metrics |= {
            "acc_avg": _mean(ranks < 1),
            "recall-macro_all": macro_recall(labels, predicted),
            "F1-macro_all": macro_f1(labels, predicted),
        }
    for worst in task.worst:
        right = in_five if worst.score == "acc_top5" else ranks < 1
        column = task.group_columns.index(task.columns.index(worst.column))
        metrics |= group_metrics(worst, right, groups[:, column])
    return metrics


def macro_recall(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that have samples of the share of their samples that were found."""
    classes = np.unique(labels)
    return float(np.mean([np.mean(predicted[labels == number] == number) for number in classes]))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 over the classes that have samples, as WILDS averages it for iWildCam (arXiv 2012.07421).

    A class that is only ever answered has no F1 of its own, but its answers are errors of the others.
    """
    scores = []
    for number in np.unique(labels):
        hits = np.count_nonzero((labels == number) & (predicted == number))
        scores.append(2 * hits / (np.count_nonzero(labels == number) + np.count_nonzero(predicted == number)))
    return float(np.mean(scores))


def group_metrics(worst: WorstGroup, right: np.ndarray, groups: np.ndarray) -> Metrics:
    """Score and size of each group that has samples, the score over all, and the least over the groups.

    `right` is bool [N], `groups` int64 [N]. The least is None where every sample is in the group left out.
    """
    scores = {int(number): _mean(right[groups == number]) for number in np.unique(groups)}
    metrics: Metrics = {f"{worst.score}_avg": _mean(right)}
    for number, score in scores.items():
        metrics[f"{worst.score}_{worst.column}:{number}"] = score
        metrics[f"count_{worst.column}:{number}"] = int(np.count_nonzero(groups == number))
    kept = [score for number, score in scores.items() if number != worst.without]
    return metrics | {worst.name: min(kept) if kept else None}


def jaccard_score(similarities: np.ndarray, right: np.ndarray) -> float:
    """Overlap of the right candidates, bool [c] with at least one, and as many with the highest similarity [c].

    |A and B| / |A or B|. A wrong candidate that ties, or whose similarity is not a number, comes first.
    """
    count = int(np.count_nonzero(right))
    scores = np.where(np.isnan(similarities), np.where(right, -math.inf, math.inf), similarities - TIE * right)
    chosen = np.lexsort((right, -scores))[:count]
    hits = int(np.count_nonzero(right[chosen]))
    return hits / (2 * count - hits)


def jaccard_metrics(scores: Sequence[float], num_candidates: Sequence[int]) -> Metrics:
    """WinoGAViL's mean Jaccard scores by number of candidates; None where no instance has that many."""
    values, sizes = np.asarray(scores), np.asarray(num_candidates)
    chosen = {
        "avg_jaccard_score": sizes > 0,
        **{f"jaccard_score_{size}": sizes == size for size in (5, 6, 10, 12)},
        "jaccard_score_5-6": sizes <= 6,
        "jaccard_score_10-12": sizes >= 10,
    }
    return {name: _mean(values[rows]) if rows.any() else None for name, rows in chosen.items()}


def retrieval_metrics(scores: dict[str, dict[str, float]]) -> Metrics:
    """What `retrieval_scores` found under clip_benchmark's names, by which `image_retrieval` finds a picture."""
    metrics: Metrics = {}
    for recall, value in scores["text_to_image"].items():
        metrics[f"image_retrieval_{recall}"] = value
        metrics[f"text_retrieval_{recall}"] = scores["image_to_text"][recall]
    both = scores["text_to_image"]["recall@1"] + scores["image_to_text"]["recall@1"]
    return metrics | {"mean_recall@1": both / 2}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
