"""What a task needs of a model, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from neuclip_scale.evaluation.datacomp.metrics import Metrics
from neuclip_scale.evaluation.datasets import ImageTransform
from neuclip_scale.evaluation.sharing import ALL, Share
from neuclip_scale.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoders:
    """A model in evaluation mode on `device`, with all that turns files into its inputs."""

    model: nn.Module
    tokenizer: Tokenizer
    transform: ImageTransform
    device: torch.device
    batch_size: int = 256
    share: Share = ALL


@dataclass(frozen=True)
class Outcome:
    """Scores of one task, and over how many samples."""

    metrics: Metrics
    num_samples: int
    unreadable: list[str]
