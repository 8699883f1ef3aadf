"""Bytes that the encoders need beside their parameters, from running their own code without memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuclip_scale.models.clip import CLIP, Towers

_PAIRS = 8191
"""Pairs of a pass. A prime that no size of a model has: what it divides grows with the pairs, the rest does not."""


@dataclass(frozen=True)
class Line:
    """Live bytes after each operation of a pass, as constant + slope * pairs: every tensor is one or the other."""

    constant: NDArray[np.int64]
    slope: NDArray[np.int64]

    def __add__(self, other: Line) -> Line:
        return Line(self.constant + other.constant, self.slope + other.slope)

    def peak(self, pairs: int) -> int:
        """The most that is live at once with `pairs` pairs."""
        return int((self.constant + self.slope * pairs).max())

    def last(self, pairs: int) -> int:
        """What is live at the end."""
        return int(self.constant[-1] + self.slope[-1] * pairs)


@dataclass(frozen=True)
class EncoderTrace:
    """Memory of both towers in training, beside parameters and inputs, for any number of pairs at a time."""

    forward: Line
    """A forward pass with a graph; its last value is what backward needs."""
    training: Line
    """Forward and backward; each parameter's gradient is let go as soon as it is complete."""
    gradients: Line
    """Complete gradients, had they been kept, along `training`."""
    forward_operations: int
    """Operations of the forward pass that do something, views left out: what the host has to start."""
    training_operations: int
    """Of both passes."""


def trace_encoders(model: CLIP, precision: str, *, blocks_in_low_precision: bool = False) -> EncoderTrace:
    """Run a planned model forward and backward on tensors without memory, under autocast as in training.

    `blocks_in_low_precision`: blocks have their parameters in `precision` already, as FSDP2 gathers them; elsewhere
    autocast makes copies, which count. Attention runs as the fused kernels that GPUs and CPUs have, which keep no
    scores. An operation's own scratch memory does not count. Tensors of float32 and `precision` have their real sizes.
    """
    with FakeTensorMode():
        run = _Run(model, precision, blocks_in_low_precision)
        gradients = torch.empty(_PAIRS, model.embed_dim), torch.empty(_PAIRS, model.embed_dim)
        with _Live([*run.known, *gradients]) as live, _FusedAttention():
            _let_go_of_gradients(run.model, live)
            output = run()
            forward, operations = len(live.history), live.operations
            loss = (output.image_features * gradients[0]).sum() + (output.text_features * gradients[1]).sum()
            (loss + output.logit_scale.sum()).backward()
            del output, loss
    return EncoderTrace(
        live.line(live.history[:forward]),
        live.line(live.history),
        live.line(live.set_aside),
        operations,
        live.operations,
    )


def trace_forward(
    model: CLIP, precision: str, towers: Towers, *, with_graph: bool, blocks_in_low_precision: bool = False
) -> Line:
    """The same for a forward pass of both towers or of one alone, whose graph is kept or not made."""
    with FakeTensorMode():
        run = _Run(model, precision, blocks_in_low_precision)
        with torch.set_grad_enabled(with_graph), _Live(run.known) as live, _FusedAttention():
            output = run(towers)
            line = live.line(live.history)
            del output
    return line


class _Run:
    """A model without memory, its inputs, and the forward pass as training has it."""

    def __init__(self, model: CLIP, precision: str, low_blocks: bool) -> None:
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.model = _stand_in(model, self._dtype if low_blocks else None)
        self._images = torch.empty(_PAIRS, 3, model.image_size, model.image_size)
        self._tokens = torch.empty(_PAIRS, model.context_length, dtype=torch.int64)
        self.known = [*self.model.parameters(), *self.model.buffers(), self._images, self._tokens]

    def __call__(self, towers: Towers = "both") -> Any:
        images, tokens = None if towers == "text" else self._images, None if towers == "image" else self._tokens
        with torch.autocast("cpu", self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            return self.model(images, tokens)


def _stand_in(model: CLIP, block_dtype: torch.dtype | None) -> CLIP:
    """The model with new parameters and buffers, made where this is called; those of blocks in another type."""
    blocks = {id(p) for block in model.blocks() for p in block.parameters()}

    def new(p: Tensor) -> Any:
        made = torch.empty(p.shape, dtype=block_dtype if block_dtype and id(p) in blocks else p.dtype)
        return nn.Parameter(made, requires_grad=p.requires_grad) if isinstance(p, nn.Parameter) else made

    tensors: dict[int, Any] = {id(tensor): new(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    clone = copy.deepcopy(model, tensors)  # deepcopy takes these for copies it has already made
    for part in clone.modules():
        part._compiled_call_impl = None
    return clone.train()


def _let_go_of_gradients(model: CLIP, live: _Live) -> None:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.set_aside_bytes += parameter.grad.nbytes
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(hook)


class _Live(TorchDispatchMode):
    """Follows the bytes of all storages that operations inside have made and that are still referred to."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        """Storages of `known` tensors do not count."""
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._fixed = self._growing = 0
        self.operations = 0
        self.set_aside_bytes = 0
        """Bytes that somebody has let go of for the count's sake; none of them grow."""
        self.history: list[tuple[int, int]] = []
        self.set_aside: list[tuple[int, int]] = []

    @staticmethod
    def line(history: Sequence[tuple[int, int]]) -> Line:
        """Fixed bytes and those that grow with the pairs, operation by operation."""
        fixed, growing = np.asarray(history, dtype=np.int64).T
        return Line(fixed, growing // _PAIRS)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += func.namespace == "aten" and not func.is_view  # type: ignore[attr-defined]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.history.append((self._fixed, self._growing))
        self.set_aside.append((self.set_aside_bytes, 0))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self._sizes:
            self._sizes[place] = storage.nbytes()
            self._count(storage.nbytes())
            weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        size = self._sizes.pop(place)
        self._count(size, -1)

    def _count(self, size: int, sign: int = 1) -> None:
        if size % _PAIRS:
            self._fixed += sign * size
        else:
            self._growing += sign * size


class _FusedAttention(TorchFunctionMode):
    """Attention without its scores: only the fused kernel's own formula says what it keeps."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and len(args) == 3:
            mask, causal = options.get("attn_mask"), bool(options.get("is_causal"))
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=args[0].dtype)
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args, 0.0, causal, attn_mask=mask)[0]
        return func(*args, **options)
