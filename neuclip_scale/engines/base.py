"""The contract between the training step and a way of spreading the encoders over ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from neuclip_scale import distributed
from neuclip_scale.config import TrainConfig, matmul_precision
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines.averaging import AVERAGE, WeightAverage
from neuclip_scale.models.clip import CLIP, CLIPOutput, Towers
from neuclip_scale.models.packing import Packing

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(ABC):
    """Owns the encoders, their optimizer and their gradients.

    Feature gradients given to `backward` are of the GLOBAL mean loss. Backends average parameter gradients over
    ranks, so `backward` multiplies by the world size, here and nowhere else.
    """

    forward_is_collective = False
    """Whether every forward pass, evaluation too, must be run by all ranks together."""

    def __init__(self, model: CLIP, optimizer: torch.optim.Optimizer, device: torch.device, precision: str) -> None:
        self.module = model
        """The bare CLIP: for passes without gradients, evaluation, checkpoints and clamping."""
        self.optimizer = optimizer
        self.device = device
        self.precision = precision
        self.average: WeightAverage | None = None
        """A running average of the weights, where the recipe asks for one."""

    @abstractmethod
    def encode(self, batch: Batch, towers: Towers = "both") -> CLIPOutput:
        """Run the encoders, or one of them; a collective for engines that shard parameters."""

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
        """Back-propagate feature gradients [micro, d]; those of the scalars, [1], ride in the last micro-batch only.

        In the others they are zero and not left out: ZeRO 3 adds the last step's gradient again to a parameter that
        had no part in a step's first backward pass.
        """
        image, text = output.both()
        total = (image * image_gradient).sum() + (text * text_gradient).sum()
        total = total + (output.logit_scale * (0.0 if scale_gradient is None else scale_gradient)).sum()
        if output.logit_bias is not None:
            total = total + (output.logit_bias * (0.0 if bias_gradient is None else bias_gradient)).sum()
        self.backward_scalar(total * distributed.world_size())

    @abstractmethod
    def backward_scalar(self, scalar: Tensor) -> None:
        """Accumulate the gradients of `scalar`, through the backend's own loss scaling."""

    @abstractmethod
    def step(self, max_grad_norm: float) -> Tensor:
        """Clip (0 does not), apply the optimizer, clear the gradients; returns the norm before clipping, [].

        Collective where gradients or parameters are sharded.
        """

    @torch.no_grad()
    def clamp_temperature(self, minimum: float, maximum: float) -> None:
        """Keep tau, of which `logit_scale` holds log(1/tau), inside its bounds (collective where it is sharded)."""
        local_part(self.module.logit_scale).clamp_(-math.log(maximum), -math.log(minimum))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every parameter by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter's name, and in full its fp32 `value` and what the optimizer keeps of it (collective).

        One parameter at a time, in an order that is the same on every rank: what is not kept is gone with the next.
        The same names and shapes under every engine, so that a run can go on under another one.
        """
        average = self.average.parts if self.average else {}
        for name, parameter in self.module.named_parameters():
            kept = self._state_of(parameter)
            if name in average:
                kept[AVERAGE] = self.whole(parameter, average[name])
            yield name, kept

    @torch.no_grad()
    def load_named_state(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Inverse of `named_state`: `read` gives what a parameter's name stands for. Collective under ZeRO."""
        average = self.average.parts if self.average else {}
        for name, parameter in self.module.named_parameters():
            kept = read(name)
            averaged = kept.pop(AVERAGE, kept["value"])  # a run that kept none begins here
            if name in average:
                average[name].copy_(self.part(parameter, averaged))
            self._load_state_of(parameter, kept)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The parameter's value, whole, and what the optimizer keeps of it (collective where it is sharded)."""
        kept = self.optimizer.state.get(parameter, {})
        whole = {key: full(_as_tensor(value)) for key, value in kept.items()}
        return {"value": full(parameter.detach()), **whole}

    def _load_state_of(self, parameter: nn.Parameter, kept: dict[str, Tensor]) -> None:
        """Inverse of `_state_of`."""
        own = local_part(parameter)
        own.copy_(self.part(parameter, kept.pop("value")))
        if parameter.requires_grad:
            on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
            self.optimizer.state[parameter] = {
                key: _as_it_was(value, own.device if on_device else torch.device("cpu"))
                if value.ndim == 0
                else like(parameter, value)
                for key, value in kept.items()
            }

    def scalar_state(self) -> dict[str, Any]:
        """What is one for the whole model: the loss scaler's state, and the steps that optimizers count by group."""
        steps = [group["step"] for group in self.optimizer.param_groups if "step" in group]
        if not steps:
            return {}
        return {"group_step": max(steps if all(isinstance(step, int) for step in steps) else map(float, steps))}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        """Inverse of `scalar_state`."""
        for group in self.optimizer.param_groups if "group_step" in state else ():
            step = state["group_step"]
            group["step"] = step if isinstance(step, int) else torch.tensor(step)

    def start_average(self, decay: float) -> None:
        """Keep a running average of the trained weights from here on."""
        self.average = WeightAverage(self.parts(), decay)

    def update_average(self, step: int) -> None:
        """Take the weights after `step` steps into the average, if there is one."""
        if self.average is not None:
            self.average.update(self.parts(), step)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the module holds the averaged weights, if there are any."""
        return nullcontext() if self.average is None else self.average.in_place_of(self.parts())

    def parts(self) -> dict[str, Tensor]:
        """What this rank holds of each trained parameter, sharing its memory."""
        named = self.module.named_parameters()
        return {name: local_part(parameter.detach()) for name, parameter in named if parameter.requires_grad}

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """What this rank holds of a tensor shaped as `parameter`."""
        return local_part(like(parameter, whole))

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """The tensor of which every rank gives its part (collective where it is sharded)."""
        if not isinstance(parameter, DTensor):
            return part
        on_mesh = part.to(parameter.device_mesh.device_type)
        layout = parameter.device_mesh, parameter.placements
        return full(DTensor.from_local(on_mesh, *layout, shape=parameter.shape, stride=parameter.stride()))

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of the encoders."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST_DTYPES[self.precision])


def set_matmul_precision(section: TrainConfig, device: torch.device) -> None:
    """Tell torch how a GPU multiplies fp32 numbers in this process: see `train.matmul_precision`."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision(matmul_precision(section))


def inputs(batch: Batch, towers: Towers) -> tuple[Tensor | None, Tensor | None, Packing | None]:
    """Pictures, tokens and their packing, or those of the one tower that runs."""
    if towers == "image":
        return batch.images, None, None
    return None if towers == "text" else batch.images, batch.tokens, batch.packing


def _as_tensor(value: Any) -> Tensor:
    """A number that an optimizer counts in Python as int64 or float64, which no optimizer keeps as a tensor."""
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    return torch.as_tensor(value)


def _as_it_was(value: Tensor, device: torch.device) -> Any:
    """Inverse of `_as_tensor`: powers of Python's numbers have digits that a tensor's have not."""
    return value.item() if value.dtype in (torch.int64, torch.float64) else value.to(device, copy=True)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (collective if it is one)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole`, sharded and placed as `parameter` is; every rank has it, so nothing is sent.

    What an optimizer keeps in another shape (adafactorbv's means of rows and columns) is replicated, as torch has it.
    """
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device, copy=True)
    device = local_part(parameter).device
    is_shaped_alike = whole.shape == parameter.shape
    placements = parameter.placements if is_shaped_alike else [Replicate()] * parameter.device_mesh.ndim
    # On the mesh's device first: with CPU offload the shards lie elsewhere.
    placed = distribute_tensor(
        whole.to(parameter.device_mesh.device_type), parameter.device_mesh, placements, src_data_rank=None
    )
    return placed.to(device)
