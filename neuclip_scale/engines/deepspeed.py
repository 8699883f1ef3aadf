"""Encoders under DeepSpeed ZeRO 0 to 3; the stage and its buffers come from a file, all else from the recipe."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError, Recipe
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines.base import Engine, inputs
from neuclip_scale.engines.zero_settings import IN_ZERO3, check_average, read_settings, recipe_settings, zero_stage
from neuclip_scale.models.building import fill, filled_blocks
from neuclip_scale.models.clip import CLIP, CLIPOutput, Towers
from neuclip_scale.optim import create_optimizer, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` around the model, with its traps closed.

    - Every backward pass counts as the last of a step unless told otherwise, and ZeRO 2 then keeps that one's
      gradients only: the boundary is set before each forward pass.
    - A tower without part in a backward pass would get its last step's gradient again under ZeRO 3: every backward
      here runs through both towers.
    - ZeRO 3 takes every backward pass for a step's first until there is a forward pass, and overwrites gradients: what
      a forward pass tells it is told before each backward, which may be of a graph that was kept.
    - Precision is autocast over fp32 parameters at every stage: DeepSpeed's bf16 would round logit_scale too.
    - The optimizer's master copy is what counts: tau is clamped there.
    """

    def __init__(self, model: CLIP, config: Recipe, device: torch.device) -> None:
        deepspeed = _library()
        # A hundred lines of its own set-up a rank, and torch 2.14's old names of collectives at every call.
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        if config.train.precision == "fp16":
            raise ConfigError("train.precision", "fp16", "not tried with DeepSpeed", "Use bf16, or engine.name=ddp.")
        settings = read_settings(config.engine.deepspeed.config)
        zero = settings.get("zero_optimization", {})
        self.stage = zero_stage(settings)
        self.forward_is_collective = self.stage == 3
        if self.stage == 3 and config.model.compile is True:
            raise ConfigError(
                "model.compile",
                True,
                IN_ZERO3,
                "Turn it off, or use engine.name=fsdp2.",
            )
        if self.stage > 0 and config.optim.name != "adamw":
            raise ConfigError(
                "optim.name",
                config.optim.name,
                f"ZeRO {self.stage} gives an optimizer slices of flattened parameters, where norms would be wrong",
                "Use adamw, the file zero0, or engine.name=ddp or fsdp2.",
            )
        check_average(config, settings)
        distributed.ensure_process_group(device)
        if device.type == "cpu":
            # Collectives through shared memory, which would be compiled at each machine's first use: gloo has its own.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(distributed.read_launch().local_rank))  # a single process has none
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        _check_settings(config.engine.deepspeed.config, zero)
        settings |= recipe_settings(config)
        if self.stage == 3:
            for part in filled_blocks(model):  # sharded at once: no rank ever has the whole model
                deepspeed.zero.Init(module=part, config_dict_or_path=settings)
        else:
            fill(model).to(device)
        offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        self._deepspeed, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_host_adam(model, config)
            if offloaded and device.type == "cuda"
            else create_optimizer(model, config.optim),
            config=settings,
        )
        super().__init__(model, optimizer, device, config.train.precision)
        self._max_grad_norm = config.train.max_grad_norm

    def encode(self, batch: Batch, towers: Towers = "both") -> CLIPOutput:
        """See `Engine.encode`; collective under ZeRO 3. DeepSpeed does the autocast."""
        module = self._deepspeed if torch.is_grad_enabled() else self.module
        with nullcontext() if torch.is_grad_enabled() else self.autocast():
            return cast(CLIPOutput, module(*inputs(batch, towers)))

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """See `Engine.micro_step`."""
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        if self.stage > 0:
            cast(Any, self.optimizer).clear_backward_seen_flag()
        return nullcontext()

    def backward_scalar(self, scalar: Tensor) -> None:
        """See `Engine.backward_scalar`."""
        self._deepspeed.backward(scalar)

    def step(self, max_grad_norm: float) -> Tensor:
        """See `Engine.step`; collective. Under ZeRO DeepSpeed clips, to the norm of the recipe it was made with."""
        if self.stage == 0:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else torch.inf)
            self._deepspeed.step()
            return norm
        if max_grad_norm != self._max_grad_norm:
            raise ValueError(f"max_grad_norm = {max_grad_norm}: DeepSpeed was set up with {self._max_grad_norm}.")
        self._deepspeed.step()
        return torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self.device, dtype=torch.float32)

    @torch.no_grad()
    def clamp_temperature(self, minimum: float, maximum: float) -> None:
        """See `Engine.clamp_temperature`; collective."""
        if self.stage == 0:
            super().clamp_temperature(minimum, maximum)
            return
        value = self._get(self.module.logit_scale)
        clamped = value.clamp(-math.log(maximum), -math.log(minimum))
        if not torch.equal(value, clamped):  # equal on all ranks
            self._set(self.module.logit_scale, clamped)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Engine.shapes`; under ZeRO 3 a parameter itself is empty."""
        return {name: whole_shape(parameter) for name, parameter in self.module.named_parameters()}

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """See `Engine.named_state`."""
        if self.stage > 0:
            self._link_moments()
        yield from super().named_state()

    def load_named_state(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """See `Engine.load_named_state`; collective."""
        if self.stage > 0:
            self._start_moments(read)
        super().load_named_state(read)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.stage == 0:
            return super()._state_of(parameter)
        kept = {"value": self._get(parameter)}
        step = next((torch.as_tensor(state["step"]) for state in self._inner.state.values() if "step" in state), None)
        if step is not None and parameter.requires_grad:
            kept |= {key: self._moment(parameter, key) for key in MOMENTS} | {"step": step.float().cpu()}
        return kept

    def _load_state_of(self, parameter: nn.Parameter, kept: dict[str, Tensor]) -> None:
        if self.stage == 0:
            super()._load_state_of(parameter, kept)
            return
        self._set(parameter, kept["value"])
        for key in MOMENTS if "step" in kept and parameter.requires_grad else ():
            self._set_master(parameter, kept[key].to(self.device), key)

    def parts(self) -> dict[str, Tensor]:
        """See `Engine.parts`."""
        if self.stage < 3:
            return super().parts()
        named: Any = self.module.named_parameters()
        return {name: parameter.ds_tensor.detach() for name, parameter in named if parameter.requires_grad}

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """See `Engine.part`. ZeRO 3 cuts the flat tensor, the last part padded."""
        if self.stage < 3:
            return super().part(parameter, whole)
        own = cast(Any, parameter).ds_tensor
        return _own_part(whole.to(own.device), own.numel())

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """See `Engine.whole`."""
        if self.stage < 3:
            return super().whole(parameter, part)
        shape = whole_shape(parameter)
        gathered = distributed.all_gather_rows(part.to(self.device))
        return gathered[: math.prod(shape)].view(shape)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer of this rank's flat partitions, which ZeRO wraps."""
        return cast(torch.optim.Optimizer, cast(Any, self.optimizer).optimizer)

    def _start_moments(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Give the flat partitions moments to be filled, as the first step would; none for a run without a step."""
        steps = (read(name).get("step") for name, p in self.module.named_parameters() if p.requires_grad)
        step = next((step for step in steps if step is not None), None)
        if step is None:
            return
        zero: Any = self.optimizer
        integer = "CPUAdam" in type(self._inner).__name__
        on_device = any(group.get("fused") or group.get("capturable") for group in self._inner.param_groups)
        for part in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            self._inner.state[part] = {
                "step": int(step) if integer else step.to(part.device if on_device else "cpu", copy=True),
                **{key: torch.zeros_like(part) for key in MOMENTS},
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Let ZeRO 1 and 2 find the moments of every group.

        DeepSpeed 0.19 links them once, after the first group's first step, when the other groups have none.
        """
        zero: Any = self.optimizer
        if self.stage < 3 and self._inner.state:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _get(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 value (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        with self._gathered(parameter, modify=False):
            return parameter.detach().clone()

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return cast(Tensor, safe_get_full_optimizer_state(parameter, key))

    def _set(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the parameter that the forward pass uses and the optimizer's master copy (collective)."""
        value = value.to(self.device)
        with self._gathered(parameter, modify=True):
            if self.stage < 3 or distributed.is_main():
                parameter.detach().copy_(value)
        if parameter.requires_grad:
            self._set_master(parameter, value, None)

    def _set_master(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            _set_partition(cast(Any, self.optimizer), parameter, value, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _gathered(self, parameter: nn.Parameter, *, modify: bool) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        context = GatheredParameters([parameter], modifier_rank=0 if modify else None)
        return cast(AbstractContextManager[Any], context)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter that ZeRO 3 may have emptied."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _set_partition(zero: Any, parameter: Any, value: Tensor, key: str | None) -> None:
    """`safe_set_full_...` of ZeRO 3, also where the ranks do not divide the parameter: the last parts are padded."""
    part, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    part.copy_(_own_part(value, part.numel()))


def _own_part(whole: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a tensor that ZeRO 3 has flattened, padded and cut."""
    padded = whole.new_zeros(size * distributed.world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded.view(-1, size)[distributed.rank()]


def _host_adam(model: CLIP, config: Recipe) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for optimizer state in the host's memory; compiled at its first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    section = config.optim
    groups = parameter_groups(model, section)
    made = DeepSpeedCPUAdam(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, adamw_mode=True)
    return cast(torch.optim.Optimizer, made)


def _check_settings(name: str, zero: dict[str, Any]) -> None:
    """Raise `ConfigError` for what DeepSpeed does not know: a misspelt word, a value of another kind."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's, of several lines
        problem = f"DeepSpeed refuses its zero_optimization: {' '.join(str(error).split())}"
        raise ConfigError("engine.deepspeed.config", name, problem, "Mend the file.") from error


def _library() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "engine.name",
            "deepspeed",
            f"DeepSpeed cannot be imported ({error})",
            "pip install 'neuclip-scale[deepspeed]'",
        ) from error
    return deepspeed
