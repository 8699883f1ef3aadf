"""Prompts of zero-shot classification, and the classifier that a text tower makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.data.batch import caption_lengths
from neuclip_scale.evaluation.datasets import EvaluationDataError, read_text
from neuclip_scale.evaluation.sharing import ALL, Share, gather_shares
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.tokenizer import Tokenizer

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates of a file, one a line; each must hold `{c}`, where the class name goes. Raises
    `EvaluationDataError`.
    """
    if not path.is_file():
        return DEFAULT_TEMPLATES
    templates = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    for template in templates:
        if "{c}" not in template:
            raise EvaluationDataError(f"{path}: template {template!r} has no {{c}} where the class name goes.")
    if not templates:
        raise EvaluationDataError(f"{path} holds no template: write one a line, or delete it for the default.")
    return templates


def fill(template: str, class_name: str) -> str:
    """`template` with the class name in place of `{c}`."""
    return template.replace("{c}", class_name)


def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    batch_size: int,
    share: Share = ALL,
) -> Tensor:
    """One unit row per class, float32 [num_classes, d]: the normalised mean of the unit embeddings of its
    prompts.

    Prompt ensembling as in CLIP (arXiv 2103.00020, section 3.1.4). Ranks divide the classes (collective, unless
    `share` is all).
    """
    step = max(1, batch_size // len(templates))
    groups = [class_names[start : start + step] for start in range(0, len(class_names), step)]

    def encode() -> dict[int, np.ndarray]:
        rows = {}
        for number, names in enumerate(groups):
            if share.owns(number):
                prompts = [fill(template, name) for name in names for template in templates]
                features = encode_texts(model, tokenizer, prompts, device, batch_size)  # [c * T, d]
                means = features.reshape(len(names), len(templates), -1).mean(dim=1)
                rows[number] = F.normalize(means, dim=-1).cpu().numpy()
        return rows

    rows = {number: part for parts in gather_shares(share, encode) for number, part in parts.items()}
    return torch.from_numpy(np.concatenate([rows[number] for number in range(len(groups))])).to(device)


@torch.no_grad()
def encode_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, batch_size: int
) -> Tensor:
    """Unit embeddings of `texts`, float32 [N, d] on `device`."""
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(list(texts[start : start + batch_size]))
        packed = {"packing": model.pack(caption_lengths(tokens), device)} if isinstance(model, CLIP) else {}
        parts.append(F.normalize(model(tokens=tokens.to(device), **packed).text_features.float(), dim=-1))
    return torch.cat(parts)
