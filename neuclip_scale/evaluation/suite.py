"""Every evaluation set under a folder, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuclip_scale.evaluation.datasets import EvaluationDataError, ImageTransform, open_set
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.retrieval import evaluate_retrieval
from neuclip_scale.evaluation.sharing import ALL, Share, agree
from neuclip_scale.evaluation.zero_shot import evaluate_zero_shot
from neuclip_scale.models.tokenizer import Tokenizer


def find_sets(folder: Path) -> dict[str, Path]:
    """Name -> folder of the sets: `folder` itself if it is one, else its sub-folders that are, sorted by
    name.

    Raises `EvaluationDataError` if there is none.
    """
    folder = Path(folder)
    if _is_set(folder):
        return {folder.resolve().name: folder}
    found = {entry.name: entry for entry in sorted(folder.glob("*/")) if _is_set(entry)}
    if not found:
        raise EvaluationDataError(
            f"{str(folder)!r} holds no evaluation set, nor does any folder in it (one has classnames.txt or "
            "dataset_type.txt). `neuclip demo-data OUT` makes OUT/eval."
        )
    return found


def evaluate_folder(
    model: nn.Module,
    folder: Path,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    device: torch.device | str,
    batch_size: int = 256,
    share: Share = ALL,
) -> dict[str, Any]:
    """Name of each set under `folder` -> its scores (plain numbers, texts and lists); collective, unless `share` is
    all, and then equal on all ranks.

    The model is on `device` and called whole with `images=` or `tokens=`, never both; it is put in evaluation
    mode and back. Raises `EvaluationDataError` for a folder without sets or a set that cannot be used.
    """
    encoders = Encoders(model, tokenizer, transform, torch.device(device), batch_size, share)
    evaluate = {"zeroshot": evaluate_zero_shot, "retrieval": evaluate_retrieval}
    sets = agree(share, lambda: {name: open_set(path) for name, path in find_sets(folder).items()})
    was_training = model.training
    model.eval()
    try:
        return {name: evaluate[dataset.task](encoders, dataset) for name, dataset in sets.items()}
    finally:
        model.train(was_training)


def _is_set(folder: Path) -> bool:
    """Also one that lacks the file saying which kind it is: opened, that is an error, and not a set left out."""
    told = (folder / "classnames.txt").is_file() or (folder / "dataset_type.txt").is_file()
    return told or any((folder / "test").glob("*.tar"))
