"""FLOPs of the encoders, counted from the operations that torch runs and not from tables.

A multiplication and an addition are two FLOPs. As everywhere where model FLOPs are reported, only matrix products,
convolutions and attention count, and attention under a causal mask counts in full.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuclip_scale.config import ModelConfig
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.packing import Packing
from neuclip_scale.models.transformer import At, Transformer, tokens_at

_Result = TypeVar("_Result")

# BatchNorm refuses a single value per channel, so two pairs are the least.
_PAIRS = 2


@dataclass(frozen=True)
class TextFlops:
    """FLOPs of one caption through the text tower, at the context length and one and two tokens below it."""

    forward: tuple[int, ...]
    training: tuple[int, ...]
    executed: tuple[int, ...]


class CaptionTokens(NamedTuple):
    """Tokens of a batch's captions: their mean and the mean of their squares, which attention takes."""

    mean: float
    mean_square: float


@dataclass(frozen=True)
class EncoderFlops:
    """FLOPs of one pair through both towers."""

    image_forward: int
    text_forward: int
    training: int
    """Forward and backward, nothing computed twice: model FLOPs."""
    recomputed: int
    """Computed again in the backward pass by gradient checkpointing."""
    context_length: int = 0
    text: TextFlops | None = None
    """Known where captions may be packed."""

    @property
    def forward(self) -> int:
        """Both towers."""
        return self.image_forward + self.text_forward

    def executed(self, pairs: int, again: tuple[int, int]) -> int:
        """What training on `pairs` runs, where gradient caching encodes some pictures and captions `again`."""
        images, texts = again
        twice = images * self.image_forward + texts * self.text_forward
        return pairs * (self.training + self.recomputed) + twice

    def at(self, captions: CaptionTokens) -> EncoderFlops:
        """With captions of these lengths in place of the context length; as it is where these are not packed."""
        if self.text is None:
            return self
        forward, training, executed = (
            _left_out(counted, self.context_length, captions)
            for counted in (self.text.forward, self.text.training, self.text.executed)
        )
        return replace(
            self,
            text_forward=self.text_forward - forward,
            training=self.training - training,
            recomputed=self.recomputed - (executed - training),
        )


def _left_out(counted: tuple[int, ...], context_length: int, captions: CaptionTokens) -> int:
    """What shorter captions leave out: FLOPs are a polynomial of degree two in the length, from three values of it."""
    full, one_less, two_less = counted
    square = (full - 2 * one_less + two_less) / 2
    linear = full - one_less - square * (2 * context_length - 1)
    return round(linear * (context_length - captions.mean) + square * (context_length**2 - captions.mean_square))


_counted: dict[ModelConfig, EncoderFlops] = {}


def encoder_flops(section: ModelConfig, model: CLIP) -> EncoderFlops:
    """`count_encoder_flops` of the model that a recipe's section makes, once in a process: it takes seconds."""
    if section not in _counted:
        _counted[section] = count_encoder_flops(model)
    return _counted[section]


def count_encoder_flops(model: CLIP) -> EncoderFlops:
    """Count with the model's own code on the meta device, where nothing is computed and no memory is used.

    `model` is left alone: no gradient, no random number, no BatchNorm statistics. Attention is counted as its two
    products forward and four backward; a fused kernel that computes the scores again does more. An encoder whose code
    looks at values cannot run on the meta device; it is counted from a real batch of two pairs, which costs a copy of
    the model and draws from forked generators.
    """
    return _on_stand_in(model, partial(_count, checkpointing=_has_grad_checkpointing(model)))


def every_token_flops(model: CLIP) -> int:
    """FLOPs of training on one pair where each block computes all tokens of a whole context, counted likewise.

    MFU is commonly given by these (PaLM, arXiv 2204.02311, appendix B): three times the forward pass, once for a tower
    that is not trained. `EncoderFlops.training` has fewer: of the last block features need one token, of a caption none
    after its end, and of the pictures no gradient.
    """
    return _on_stand_in(model, _count_every_token)


def _on_stand_in(model: CLIP, count: Callable[[CLIP, torch.device], _Result]) -> _Result:
    try:
        return count(_stand_in(model, torch.device("meta")), torch.device("meta"))
    except (NotImplementedError, RuntimeError):
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return count(_stand_in(model, device), device)


def _count_every_token(model: CLIP, device: torch.device) -> int:
    if _has_grad_checkpointing(model):
        model.set_grad_checkpointing(False)
    for part in list(model.modules()):
        if isinstance(part, Transformer):
            part.forward = partial(_every_token, part)  # type: ignore[method-assign]
    images, tokens = _inputs(model, device)
    towers = _run(model, images, None), _run(model, None, tokens)
    return sum(tower.forward * (3 if tower.both > tower.forward else 1) for tower in towers)


def _every_token(stack: Transformer, x: Tensor, at: At = None, packing: Packing | None = None) -> Tensor:
    return tokens_at(Transformer.forward(stack, x, None, packing), at, packing)


def _inputs(model: CLIP, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.zeros(_PAIRS, 3, model.image_size, model.image_size, device=device)
    return images, torch.zeros(_PAIRS, model.context_length, dtype=torch.int64, device=device)


def _count(model: CLIP, device: torch.device, checkpointing: bool) -> EncoderFlops:
    images, tokens = _inputs(model, device)
    by_length = model.packs_captions
    lengths = [model.context_length - less for less in range(3 if by_length else 1)]

    def count() -> tuple[_Counted, list[_Counted]]:
        """Of a picture, and of a caption of each length."""
        return _run(model, images, None), [_run(model, None, tokens[:, :length]) for length in lengths]

    if checkpointing:
        model.set_grad_checkpointing(False)
    image, texts = count()
    again, texts_again = image, texts
    if checkpointing:
        model.set_grad_checkpointing(True)
        again, texts_again = count()
    text = TextFlops(
        forward=tuple(each.forward for each in texts),
        training=tuple(each.both for each in texts),
        executed=tuple(each.both for each in texts_again),
    )
    return EncoderFlops(
        image.forward,
        text.forward[0],
        image.both + text.training[0],
        again.both + text.executed[0] - image.both - text.training[0],
        model.context_length,
        text if by_length else None,
    )


class _Counted(NamedTuple):
    """FLOPs of one sample's forward pass, and of its forward and backward pass."""

    forward: int
    both: int


def _run(model: CLIP, images: Tensor | None, tokens: Tensor | None) -> _Counted:
    """Of all blocks, from two and three of them where all are alike: each further one in their midst adds as much."""
    stack = getattr(model if images is None else model.visual, "transformer", None)
    if not isinstance(stack, Transformer) or len(stack.resblocks) <= 5 or not _alike(stack.resblocks):
        return _run_all(model, images, tokens)
    blocks, counted = stack.resblocks, []
    for number in (2, 3):
        stack.resblocks = nn.ModuleList([*blocks[: number - 1], blocks[-1]])
        counted.append(_run_all(model, images, tokens))
    stack.resblocks = blocks
    forward, both = (few + (len(blocks) - 2) * (more - few) for few, more in zip(*counted, strict=True))
    return _Counted(forward, both)


def _alike(blocks: nn.ModuleList) -> bool:
    """Whether the same parameters of each are trained."""
    return len({tuple((name, p.requires_grad) for name, p in block.named_parameters()) for block in blocks}) == 1


def _run_all(model: CLIP, images: Tensor | None, tokens: Tensor | None) -> _Counted:
    # The counter does not know every fused kernel (the CPU's, for one), but all of this one's products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (features,) = (part for part in model(images, tokens)[:2] if part is not None)
        forward = counter.get_total_flops()
        if features.requires_grad:
            features.sum().backward()
    return _Counted(forward // _PAIRS, counter.get_total_flops() // _PAIRS)


def _stand_in(model: CLIP, device: torch.device) -> CLIP:
    """A copy of the model whose parameters and buffers are new ones on `device`."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(_moved(p, device), requires_grad=p.requires_grad) for p in model.parameters()
    }
    tensors |= {id(buffer): _moved(buffer, device) for buffer in model.buffers()}
    clone = copy.deepcopy(model, tensors)  # deepcopy takes these for copies it has already made
    for part in clone.modules():
        part._compiled_call_impl = None  # the plain code is counted, whatever a compiler makes of it
    return clone.train()


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_meta:  # has no values to copy
        return torch.zeros_like(tensor, device=device)
    return tensor.detach().to(device, copy=True)


def _has_grad_checkpointing(model: CLIP) -> bool:
    """Whether any part of either tower recomputes its activations."""
    # The names that this package, timm, and transformers give to the switch.
    switches = ("grad_checkpointing", "gradient_checkpointing")
    return any(getattr(part, name, False) for part in model.modules() for name in switches)
