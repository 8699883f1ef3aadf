"""The objectives as drop-in loss modules for other people's trainers.

    loss = create_loss("neuclip", embed_dim=512)
    loss(image_features, text_features, logit_scale, sample_index=index).backward()

Inside a process group the loss is over all ranks' pairs; gradients are scaled for a trainer that AVERAGES them over
ranks (DDP, FSDP, DeepSpeed), as open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)` are.

`loss.state_dict()` holds what it has learned. Of a u table, temperatures and a queue each rank has a part, so with
those every rank saves and loads its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.config import (
    AmortizedConfig,
    IndividualTemperatureConfig,
    NPNConfig,
    ObjectiveConfig,
    QueueConfig,
    check_objective,
    parse,
)
from neuclip_scale.normalizers.table import SampleTable
from neuclip_scale.objectives import Objective, ObjectiveOutput, create_objective
from neuclip_scale.objectives.registry import Problem
from neuclip_scale.similarity import PairFeatures, RingPairs


def create_loss(name: str, *, embed_dim: int, dataset_size: int | None = None, **options: Any) -> ContrastiveLoss:
    """Build a loss by name; the names are those of `objective.name` in a recipe (`OBJECTIVES`).

    `embed_dim` d; `dataset_size` n, needed by losses that keep something per sample or count epochs; `num_epochs` is
    the length of the run, for schedules over epochs; `global_batch_size` B, from which the queue takes its size;
    `encode_dataset` gives the features of all n pairs (exact). Other
    `options` are fields of `ObjectiveConfig` (tile_size, rho, eps, gamma_min, ...) or of the section that belongs to
    the loss: `NPNConfig` (neuclip), `QueueConfig` (neuclip-queue), `AmortizedConfig` (amorlip),
    `IndividualTemperatureConfig` (isogclr, fastclip-v2). Raises `ConfigError` for an unknown name or option, and for a
    value that `neuclip train` refuses.
    """
    known = ("num_epochs", "global_batch_size", "encode_dataset")
    given = {key: options.pop(key) for key in known if key in options}
    tree: dict[str, Any] = {"name": name}
    for key, value in options.items():
        section = _section_of(key, name)
        if section:
            tree.setdefault(section, {})[key] = value
        else:
            tree[key] = value
    problem = Problem(
        embed_dim=embed_dim,
        dataset_size=dataset_size,
        **given,
    )
    config = parse(ObjectiveConfig, tree)
    check_objective(config)
    return ContrastiveLoss(create_objective(config, problem), exchange=config.exchange)


_SECTIONS = {
    "npn": NPNConfig,
    "queue": QueueConfig,
    "amortized": AmortizedConfig,
    "individual": IndividualTemperatureConfig,
}
_OWN_SECTION = {
    "neuclip": "npn",
    "neuclip-queue": "queue",
    "amorlip": "amortized",
    "isogclr": "individual",
    "fastclip-v2": "individual",
}


def _section_of(option: str, objective: str) -> str:
    """The section an option goes to: the objective's own first, '' for `ObjectiveConfig` itself, then any other.

    So amorlip's `rho` is its schedule, and a list of options for all losses may name those that one of them lacks.
    """

    def has(section: str) -> bool:
        return any(field.name == option for field in dataclasses.fields(_SECTIONS[section]))

    own = _OWN_SECTION.get(objective)
    if own and has(own):
        return own
    if any(field.name == option for field in dataclasses.fields(ObjectiveConfig)):
        return ""
    return next((section for section in _SECTIONS if has(section)), "")


class ContrastiveLoss(nn.Module):
    """An objective behind autograd. Its state (table, NPN) moves with every call in training mode."""

    def __init__(self, objective: Objective, *, exchange: Literal["gather", "ring"] = "gather") -> None:
        super().__init__()
        self.objective, self.exchange = objective, exchange
        self._rows: Tensor | None = None
        tables = [module for module in objective.modules() if isinstance(module, SampleTable)]
        self._dataset_size = tables[0].dataset_size if tables else None

    def get_extra_state(self) -> dict[str, Any]:
        """What this rank alone has, and which rank it is: trainers save by `state_dict`, often on one rank (no
        communication).
        """
        return {**self._layout(), "rank_state": self.objective.rank_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_extra_state`, on the same rank of as many; on any number if a single process saved. Raises
        ValueError for another rank's part.
        """
        if state["world_size"] == 1 or not state["rank_state"]:
            self.objective.load_rank_states([state["rank_state"]])
            return
        there, here = ({key: each[key] for key in ("rank", "world_size")} for each in (state, self._layout()))
        if there != here:
            raise ValueError(
                f"state_dict: the part of rank {there['rank']} of {there['world_size']}, loaded on rank {here['rank']} "
                f"of {here['world_size']}. Let every rank save and load the loss's state_dict, on as many ranks."
            )
        for name, own in self.objective.rank_state().items():
            own.copy_(state["rank_state"][name])

    @staticmethod
    def _layout() -> dict[str, int]:
        return {"rank": distributed.rank(), "world_size": distributed.world_size()}

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
        element; `sample_index` [b] int64, dense index in the data set; `logit_bias`, one element, is siglip's alone.
        A loss with a table over the samples raises ValueError for an index outside it (on a GPU the kernel fails).
        With `output_dict` returns {"contrastive_loss": loss}, as open_clip's losses do. Sums in fp32, or in fp64
        for fp64 features; gradients have the features' dtype.
        """
        output = self.step(image_features, text_features, logit_scale, logit_bias, sample_index)
        loss = distributed.all_reduce_sum(output.loss.clone())
        gradients = [
            (logit_scale, output.logit_scale_gradient),
            (logit_bias, output.logit_bias_gradient),
            (image_features, output.image_gradient),
            (text_features, output.text_gradient),
        ]
        del output
        while gradients:  # each is let go once it is kept: fp32 gradients of halves are the peak of memory
            of, gradient = gradients.pop(0)
            if of is not None and gradient is not None and of.requires_grad:
                loss = cast(Tensor, _WithGradient.apply(loss, of, gradient))
            del gradient
        return {"contrastive_loss": loss} if output_dict else loss

    def log_normalizers(self) -> tuple[Tensor, Tensor]:
        """(image_rows [b], text_rows [b]) used in the last call, in terms of margins: log of normalised
        sums of exp((s_ij - s_ii)/tau). For openclip the plain sum over the batch, the positive pair included. Raises
        RuntimeError before the first call and for siglip, which has none."""
        if self._rows is None:
            raise RuntimeError(
                "log_normalizers: there was no call of this loss yet, or it has no normalizers (siglip)."
            )
        return self._rows[:, 0], self._rows[:, 1]

    def step(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        sample_index: Tensor | None,
    ) -> ObjectiveOutput:
        """Gather, then run the objective on the global batch (collective)."""
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        # Halves stay as they are, also on the wire: their products are exact in fp32, in which they are summed.
        kept = image.dtype if image.dtype == text.dtype and image.dtype.itemsize == 2 else dtype
        image, text = image.detach().to(kept), text.detach().to(kept)
        if dtype == torch.float64:
            self.double()
        gather = distributed.all_gather_rows
        if self.exchange == "ring" and distributed.world_size() > 1:
            pairs: PairFeatures = RingPairs.local(image, text)
        else:
            pairs = PairFeatures(image, text, gather(image), gather(text), distributed.rank() * image.shape[0])
        world_index = None if sample_index is None else self._inside(gather(sample_index))
        # Trainers call their loss inside autocast; ours is fp32 throughout.
        with torch.autocast(image.device.type, enabled=False):
            scalars = [None if s is None else s.detach().to(dtype).reshape(1) for s in (logit_scale, logit_bias)]
            output = self.objective(pairs, scalars[0], world_index, scalars[1])
        self._rows = None if output.normalizers is None else output.normalizers.rows
        return output

    def _inside(self, world_index: Tensor) -> Tensor:
        """The same indices, if every one has a row in the objective's tables: a negative one would have another's."""
        if self._dataset_size is None:
            return world_index
        is_inside = (world_index >= 0) & (world_index < self._dataset_size)
        told = f"outside 0 to {self._dataset_size - 1}. Give each pair's dense index, or the right dataset_size."
        if world_index.is_cuda:  # for which the host need not wait
            torch._assert_async(is_inside.all(), f"sample_index: {told}")
        elif not bool(is_inside.all()):
            raise ValueError(f"sample_index = {int(world_index[~is_inside][0])}: {told}")
        return world_index


class _WithGradient(torch.autograd.Function):
    """A loss, unchanged, that knows its gradient by one of its inputs, which was computed with it.

    One node for each input, so that a backward pass that keeps nothing never holds a second copy of both.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, of: Tensor, gradient: Tensor) -> Tensor:
        world = distributed.world_size()
        gradient = gradient if world == 1 else gradient * world
        # A GradScaler's factor is to come before the rounding to fp16, whose range ends at 6e-8.
        ctx.dtype = of.dtype
        ctx.save_for_backward(gradient.to(torch.float32 if of.dtype == torch.float16 else of.dtype).reshape(of.shape))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        (gradient,) = ctx.saved_tensors
        # A graph that nobody will go through again needs no second copy.
        gradient = gradient * grad_output if _graph_is_kept() else gradient.mul_(grad_output)
        return grad_output, gradient.to(ctx.dtype), None


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs was given retain_graph or create_graph; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
