"""Zero-shot classification: pictures against the names of all classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.evaluation.datasets import (
    EvaluationSet,
    Reading,
    Unreadable,
    nothing_usable,
    read_batches,
)
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.prompts import read_templates, zero_shot_classifier
from neuclip_scale.evaluation.ranking import pessimistic_ranks, recall_at
from neuclip_scale.evaluation.sharing import agree, gather_shares


class Predictions(NamedTuple):
    """What a model answered to each picture of a set, in the set's order; arrays of int64."""

    ranks: np.ndarray
    """[N] Number of wrong classes that score at least as high as the right one."""
    labels: np.ndarray
    """[N] The right classes."""
    predicted: np.ndarray
    """[N] The classes answered: the right one only where its rank is 0."""
    groups: np.ndarray
    """[N, G] The columns asked for of each picture's .npy."""
    num_templates: int
    unreadable: list[str]


def predict(
    encoders: Encoders, dataset: EvaluationSet, *, whole_shards: bool = False, group_columns: tuple[int, ...] = ()
) -> Predictions:
    """The answers of the model to a set's pictures (collective, unless the share is all); see `Reading`.

    Raises `EvaluationDataError` for an unusable set, on every rank.
    """
    reading = Reading(share=encoders.share, whole_shards=whole_shards, group_columns=group_columns)
    model, device, batch_size = encoders.model, encoders.device, encoders.batch_size
    path = dataset.folder / "zeroshot_classification_templates.txt"
    templates = agree(encoders.share, lambda: read_templates(path))
    classifier = zero_shot_classifier(
        model, encoders.tokenizer, dataset.class_names, templates, device, batch_size, encoders.share
    )

    def answer() -> tuple[np.ndarray, list[str]]:
        unreadable = Unreadable()
        tables = [np.empty((0, 4 + len(group_columns)), np.int64)]
        for batch in read_batches(dataset, encoders.transform, batch_size, unreadable, reading):
            answers = _answer(model, batch.images.to(device), torch.tensor(batch.labels, device=device), classifier)
            given = torch.tensor([batch.positions, batch.labels]).T  # [b, 2]
            groups = torch.tensor(batch.groups, dtype=torch.int64).reshape(len(given), len(group_columns))
            tables.append(torch.cat([given, answers.cpu(), groups], dim=1).numpy())
        return np.concatenate(tables), unreadable.reasons

    parts = gather_shares(encoders.share, answer)
    table = np.concatenate([part for part, _ in parts])
    table = table[table[:, 0].argsort(kind="stable")]
    unreadable = [reason for _, reasons in parts for reason in reasons]
    if not len(table):
        raise nothing_usable(dataset.folder, unreadable)
    return Predictions(table[:, 2], table[:, 1], table[:, 3], table[:, 4:], len(templates), unreadable)


@torch.no_grad()
def _answer(model: nn.Module, images: Tensor, labels: Tensor, classifier: Tensor) -> Tensor:
    """[b, 2]: the rank of the right class, and the class answered."""
    features = F.normalize(model(images=images).image_features.float(), dim=-1)
    ranks = pessimistic_ranks(features, classifier, labels[:, None])
    # A tie is lost: the best wrong class is the answer, so that a model that sees nothing gets nothing.
    wrong = (features @ classifier.T).scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    return torch.stack([ranks, torch.where(ranks < 1, labels, wrong)], dim=1)


def evaluate_zero_shot(encoders: Encoders, dataset: EvaluationSet) -> dict[str, Any]:
    """Scores of `classification_scores`, the number of samples, and what could not be read (collective, unless the
    share is all). Raises `EvaluationDataError` for an unusable set.
    """
    found = predict(encoders, dataset)
    ranks, labels = torch.from_numpy(found.ranks), torch.from_numpy(found.labels)
    return {
        "task": "zeroshot",
        **classification_scores(ranks, labels, len(dataset.class_names)),
        "num_templates": found.num_templates,
        "num_unreadable": len(found.unreadable),
        "unreadable": found.unreadable,
    }


def classification_scores(ranks: Tensor, labels: Tensor, num_classes: int) -> dict[str, float | int]:
    """Top-1, top-5 and mean per-class recall, with what guessing gives, from ranks and labels, both int64
    [N].

    chance: a class drawn at random; majority: always the class that most pictures have. The mean per-class
    recall is over the classes that have pictures.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    hits = torch.bincount(labels[ranks < 1], minlength=num_classes)
    present = counts > 0
    return {
        "top1": recall_at(ranks, 1),
        "top5": recall_at(ranks, 5),
        "mean_per_class_recall": float((hits[present].double() / counts[present]).mean()),
        "chance_top1": 1 / num_classes,
        "chance_top5": min(5, num_classes) / num_classes,
        "majority": float(counts.max()) / len(labels),
        "num_pictures": len(labels),
        "num_classes": num_classes,
    }
