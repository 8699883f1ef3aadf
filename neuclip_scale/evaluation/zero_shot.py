"""Zero-shot classification: pictures against the names of all classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.evaluation.datasets import EvaluationSet, ImageTransform, Unreadable, read_batches
from neuclip_scale.evaluation.prompts import read_templates, zero_shot_classifier
from neuclip_scale.evaluation.ranking import pessimistic_ranks, recall_at
from neuclip_scale.models.tokenizer import Tokenizer


@torch.no_grad()
def evaluate_zero_shot(
    model: nn.Module,
    dataset: EvaluationSet,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    device: torch.device,
    batch_size: int,
) -> dict[str, Any]:
    """Scores of `classification_scores`, the number of samples, and what could not be read.

    The model must be in evaluation mode. Raises `EvaluationDataError` for an unusable set.
    """
    templates = read_templates(dataset.folder / "zeroshot_classification_templates.txt")
    classifier = zero_shot_classifier(model, tokenizer, dataset.class_names, templates, device, batch_size)
    unreadable = Unreadable()
    ranks, labels = [], []
    for batch in read_batches(dataset, transform, batch_size, unreadable):
        features = F.normalize(model(images=batch.images.to(device)).image_features.float(), dim=-1)
        target = torch.tensor(batch.labels, device=device)
        ranks.append(pessimistic_ranks(features, classifier, target[:, None]).cpu())
        labels.append(target.cpu())
    scores = classification_scores(torch.cat(ranks), torch.cat(labels), len(dataset.class_names))
    return {
        "task": "zeroshot",
        **scores,
        "num_templates": len(templates),
        "num_unreadable": len(unreadable.reasons),
        "unreadable": unreadable.reasons,
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
