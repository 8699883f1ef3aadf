"""Encoders sharded with FSDP2 (`fully_shard`): parameters, gradients and optimizer state, each rank a part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError, OptimConfig, Recipe
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines.base import AUTOCAST_DTYPES, Engine, full, inputs
from neuclip_scale.models.building import filled_blocks
from neuclip_scale.models.clip import CLIP, CLIPOutput, Towers
from neuclip_scale.optim import create_optimizer, optimizer_over


class FSDP2Engine(Engine):
    """Every block of both towers is gathered before it runs, and what is left, one group more, before them. Parameters
    stay until the step's last backward pass; with `engine.fsdp.reshard_after_forward` each pass gathers them anew.

    With `engine.fsdp.replicas` R the ranks form R groups that each hold the whole model (hybrid sharding). In bf16 the
    blocks' parameters travel and multiply in bf16; master weights, gradients' sums, embeddings, final projections and
    logit_scale stay fp32.
    """

    forward_is_collective = True

    def __init__(self, model: CLIP, config: Recipe, device: torch.device) -> None:
        section = config.engine.fsdp
        if config.train.precision == "fp16":
            raise ConfigError(
                "train.precision", "fp16", "FSDP2 here has no loss scaler", "Use bf16, or engine.name=ddp."
            )
        distributed.ensure_process_group(device, host_tensors=section.cpu_offload)
        options: dict[str, Any] = {
            "mesh": _mesh(device, section.replicas),
            "reshard_after_forward": section.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if section.cpu_offload
            else OffloadPolicy(),
        }
        _try_optimizer(config.optim, options["mesh"])
        dtype = AUTOCAST_DTYPES.get(config.train.precision)
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in filled_blocks(model):  # sharded at once: no rank ever has the whole model
            fully_shard(part, mp_policy=MixedPrecisionPolicy() if part is model else mixed, **options)
        # After sharding, which puts other parameters into the modules.
        super().__init__(model, create_optimizer(model, config.optim), device, config.train.precision)
        self._sharded = cast(FSDPModule, model)
        self._accumulate_sharded = section.accumulate_sharded
        self._reshards = section.reshard_after_forward
        if not self._reshards:
            model.register_forward_hook(self._let_go)  # after FSDP's own

    def _let_go(self, *_: object) -> None:
        """After an evaluation, whose parameters no backward pass lets go: others may be read or written next."""
        if torch.is_grad_enabled() or self.module.training:
            return
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def encode(self, batch: Batch, towers: Towers = "both") -> CLIPOutput:
        """See `Engine.encode`; collective."""
        with self.autocast():
            return cast(CLIPOutput, self.module(*inputs(batch, towers)))

    @contextmanager
    def _synchronising(self, is_last: bool) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(is_last or self._accumulate_sharded)
        self._sharded.set_is_last_backward(is_last)
        self._sharded.set_reshard_after_backward(is_last or self._reshards)
        yield

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """See `Engine.micro_step`. Until the last micro-batch gradients are whole on every rank, unless the recipe has
        them reduced in each; and parameters, unless it lets them go after a forward pass.
        """
        return self._synchronising(is_last)

    def backward_scalar(self, scalar: Tensor) -> None:
        """See `Engine.backward_scalar`."""
        scalar.backward()  # type: ignore[no-untyped-call]

    def step(self, max_grad_norm: float) -> Tensor:
        """See `Engine.step`; collective."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return full(norm)


def _mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """All ranks in one row, or `replicas` rows of them."""
    size = distributed.world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    if replicas < 1 or size % replicas:
        raise ConfigError(
            "engine.fsdp.replicas", replicas, f"does not divide the {size} rank(s)", "Use a divisor; 1 shards over all."
        )
    return init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def _try_optimizer(section: OptimConfig, mesh: DeviceMesh) -> None:
    """Raise `ConfigError` for an optimizer that does with its tensors what torch does not do with sharded ones
    (collective): two steps on small ones show it, where a run's first would end with an error of torch's.
    """
    if section.name == "adamw":
        return
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    trial = []
    for shape in (64, 16, 4, 4), (64, 32), (64,), (1,):
        whole = torch.ones(shape, device=mesh.device_type)
        trial.append(nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None)))
    optimizer = optimizer_over([{"params": trial, "weight_decay": section.weight_decay}], section)
    try:
        for _ in range(2):
            for parameter in trial:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except Exception as error:  # torch's, of several kinds
        told = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(
            "optim.name",
            section.name,
            f"torch does not do to sharded tensors what it does to its own ({told})",
            "Use adamw, lamb, lion, muon or sgd, or engine.name=ddp.",
        ) from error
