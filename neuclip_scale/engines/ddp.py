"""Replicated encoders: one process, or DistributedDataParallel over gloo or NCCL."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neuclip_scale import distributed
from neuclip_scale.config import Recipe, local_batch_size, micro_batch_size
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines.base import Engine, inputs
from neuclip_scale.models.building import fill
from neuclip_scale.models.clip import CLIP, CLIPOutput, Towers
from neuclip_scale.optim import create_optimizer


class DDPEngine(Engine):
    """Every rank holds the whole model; gradients are averaged in the last micro-batch's backward."""

    def __init__(self, model: CLIP, config: Recipe, device: torch.device) -> None:
        fill(model).to(device)
        super().__init__(model, create_optimizer(model, config.optim), device, config.train.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.wrapped: nn.Module = model
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            # The same parameters take part in every backward pass, so that DDP need not look for those that do not.
            # Not with several micro-batches: DDP would learn the graph from one that it does not reduce.
            world_size = distributed.world_size()
            single = micro_batch_size(config, world_size) >= local_batch_size(config, world_size)
            self.wrapped = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, static_graph=single
            )

    def encode(self, batch: Batch, towers: Towers = "both") -> CLIPOutput:
        """See `Engine.encode`. Without gradients the bare module is used: DDP would arm its reducer for nothing."""
        module = self.wrapped if torch.is_grad_enabled() else self.module
        with self.autocast():
            return cast(CLIPOutput, module(*inputs(batch, towers)))

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """See `Engine.micro_step`."""
        if is_last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def backward_scalar(self, scalar: Tensor) -> None:
        """See `Engine.backward_scalar`."""
        self.scaler.scale(scalar).backward()  # type: ignore[no-untyped-call]

    def step(self, max_grad_norm: float) -> Tensor:
        """See `Engine.step`. No communication: the gradients are averaged already."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else torch.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def scalar_state(self) -> dict[str, Any]:
        """See `Engine.scalar_state`."""
        return super().scalar_state() | {"scaler": self.scaler.state_dict()}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_scalar_state`."""
        super().load_scalar_state(state)
        if self.scaler.is_enabled() and state.get("scaler"):  # absent where the run was not fp16 before
            self.scaler.load_state_dict(state["scaler"])
