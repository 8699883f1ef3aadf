"""Prompts of zero-shot classification, and the classifier that a text tower makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.evaluation.datasets import EvaluationDataError
from neuclip_scale.models.tokenizer import Tokenizer

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates of a file, one a line; each must hold `{c}`, where the class name goes. Raises
    `EvaluationDataError`.
    """
    if not path.is_file():
        return DEFAULT_TEMPLATES
    templates = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    for template in templates:
        if "{c}" not in template:
            raise EvaluationDataError(f"{path}: template {template!r} has no {{c}} where the class name goes.")
    if not templates:
        raise EvaluationDataError(f"{path} holds no template: write one a line, or delete it for the default.")
    return templates


def fill(template: str, class_name: str) -> str:
    """`template` with the class name in place of `{c}`."""
    return template.replace("{c}", class_name)


@torch.no_grad()
def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """One unit row per class, float32 [num_classes, d]: the normalised mean of the unit embeddings of its
    prompts.

    Prompt ensembling as in CLIP (arXiv 2103.00020, section 3.1.4).
    """
    prompts = [fill(template, name) for name in class_names for template in templates]
    features = encode_texts(model, tokenizer, prompts, device, batch_size)  # [C * T, d]
    means = features.reshape(len(class_names), len(templates), -1).mean(dim=1)
    return F.normalize(means, dim=-1)


@torch.no_grad()
def encode_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, batch_size: int
) -> Tensor:
    """Unit embeddings of `texts`, float32 [N, d] on `device`."""
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
        parts.append(F.normalize(model(tokens=tokens).text_features.float(), dim=-1))
    return torch.cat(parts)
