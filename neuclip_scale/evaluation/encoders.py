"""A model with all that turns the files of an evaluation set into its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from neuclip_scale.evaluation.datasets import ImageTransform
from neuclip_scale.evaluation.sharing import ALL, Share
from neuclip_scale.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoders:
    """A model in evaluation mode on `device`, and this rank's share of the files."""

    model: nn.Module
    tokenizer: Tokenizer
    transform: ImageTransform
    device: torch.device
    batch_size: int = 256
    share: Share = ALL
