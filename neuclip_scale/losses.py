"""The objectives as drop-in loss modules for other people's trainers.

    loss = create_loss("neuclip", embed_dim=512)
    loss(image_features, text_features, logit_scale, sample_index=index).backward()

Inside a process group the loss is over all ranks' pairs; gradients are scaled for a trainer that AVERAGES them over
ranks (DDP, FSDP, DeepSpeed), as open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)` are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.config import NPNConfig, ObjectiveConfig, parse
from neuclip_scale.objectives import Objective, ObjectiveOutput, create_objective
from neuclip_scale.objectives.registry import Problem
from neuclip_scale.similarity import PairFeatures


def create_loss(name: str, *, embed_dim: int, dataset_size: int | None = None, **options: Any) -> ContrastiveLoss:
    """Build a loss by name: openclip, fastclip-v3 or neuclip.

    `embed_dim` d; `dataset_size` n, needed by losses that keep something per sample. `options` are fields of
    `ObjectiveConfig` (tile_size, rho, eps, gamma_min, ...) or of `NPNConfig` (num_prototypes, updates_per_step, ...).
    Raises `ConfigError` for an unknown name or option.
    """
    npn_fields = {field.name for field in dataclasses.fields(NPNConfig)}
    npn = {key: value for key, value in options.items() if key in npn_fields}
    rest = {key: value for key, value in options.items() if key not in npn_fields}
    section = parse(ObjectiveConfig, {"name": name, "npn": npn, **rest})
    return ContrastiveLoss(create_objective(section, Problem(embed_dim=embed_dim, dataset_size=dataset_size)))


class ContrastiveLoss(nn.Module):
    """An objective behind autograd. Its state (table, NPN) moves with every call in training mode."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self._rows: Tensor | None = None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_index: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Global loss, a scalar equal on all ranks (collective).

        `image_features`, `text_features` [b, d] L2-normalised, the same b on every rank; `logit_scale` = 1/tau, one
        element; `sample_index` [b] int64, dense index in the data set. `logit_bias` is not used by these losses.
        With `output_dict` returns {"contrastive_loss": loss}, as open_clip's losses do. Computes in fp32, or in fp64
        for fp64 features.
        """
        loss = cast(Tensor, _Apply.apply(image_features, text_features, logit_scale, self, sample_index))
        return {"contrastive_loss": loss} if output_dict else loss

    def log_normalizers(self) -> tuple[Tensor, Tensor]:
        """(image_rows [b], text_rows [b]) used in the last call, in terms of margins: log of normalised
        sums of exp((s_ij - s_ii)/tau). For openclip the plain sum over the batch, the positive pair included."""
        if self._rows is None:
            raise RuntimeError("log_normalizers: there was no call of this loss yet.")
        return self._rows[:, 0], self._rows[:, 1]

    def step(self, image: Tensor, text: Tensor, logit_scale: Tensor, sample_index: Tensor | None) -> ObjectiveOutput:
        """Gather, then run the objective on the global batch (collective)."""
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        image, text = image.detach().to(dtype), text.detach().to(dtype)
        if dtype == torch.float64:
            self.double()
        gather = distributed.all_gather_rows
        pairs = PairFeatures(image, text, gather(image), gather(text), distributed.rank() * image.shape[0])
        world_index = None if sample_index is None else gather(sample_index)
        # Trainers call their loss inside autocast; ours is fp32 throughout.
        with torch.autocast(image.device.type, enabled=False):
            output = self.objective(pairs, logit_scale.detach().to(dtype).reshape(1), world_index)
        self._rows = output.rows
        return output


class _Apply(torch.autograd.Function):
    """Gradients are computed with the loss, tile by tile, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, loss: ContrastiveLoss, index: Tensor | None
    ) -> Tensor:
        output = loss.step(image, text, logit_scale, index)
        world = distributed.world_size()
        ctx.save_for_backward(
            (output.image_gradient * world).to(image.dtype),
            (output.text_gradient * world).to(text.dtype),
            (output.logit_scale_gradient * world).to(logit_scale.dtype).reshape(logit_scale.shape),
        )
        return distributed.all_reduce_sum(output.loss.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        return (*(saved * grad_output for saved in ctx.saved_tensors), None, None)
