"""The contract between the training step and a way of spreading the encoders over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.data.batch import Batch
from neuclip_scale.models.clip import CLIP, CLIPOutput

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(ABC):
    """Owns the encoders, their optimizer and their gradients.

    Feature gradients given to `backward` are of the GLOBAL mean loss. Backends average parameter gradients over
    ranks, so `backward` multiplies by the world size, here and nowhere else.
    """

    def __init__(self, model: CLIP, optimizer: torch.optim.Optimizer, device: torch.device, precision: str) -> None:
        self.module = model
        """The bare CLIP: for passes without gradients, evaluation, checkpoints and clamping."""
        self.optimizer = optimizer
        self.device = device
        self.precision = precision

    @abstractmethod
    def encode(self, batch: Batch) -> CLIPOutput:
        """Run the encoders; a collective for engines that shard parameters."""

    @abstractmethod
    def micro_step(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Wrap encode and backward of one micro-batch; gradients are reduced over ranks in the last (collective)."""

    def backward(
        self,
        output: CLIPOutput,
        image_gradient: Tensor,
        text_gradient: Tensor,
        scale_gradient: Tensor | None,
        bias_gradient: Tensor | None = None,
    ) -> None:
        """Back-propagate feature gradients [micro, d]; those of the scalars, [1], ride in the last micro-batch only."""
        assert output.image_features is not None
        assert output.text_features is not None
        total = (output.image_features * image_gradient).sum() + (output.text_features * text_gradient).sum()
        if scale_gradient is not None:
            total = total + (output.logit_scale * scale_gradient).sum()
        if bias_gradient is not None:
            assert output.logit_bias is not None
            total = total + (output.logit_bias * bias_gradient).sum()
        self.backward_scalar(total * distributed.world_size())

    @abstractmethod
    def backward_scalar(self, scalar: Tensor) -> None:
        """Accumulate the gradients of `scalar`, through the backend's own loss scaling."""

    @abstractmethod
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Global gradient norm before clipping, []; 0 only measures (collective where gradients are sharded)."""

    @abstractmethod
    def step(self) -> None:
        """Apply the optimizer and clear the gradients."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Encoders, optimizer and loss scaler as tensors and numbers on the CPU or device."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of the encoders."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST_DTYPES[self.precision])
