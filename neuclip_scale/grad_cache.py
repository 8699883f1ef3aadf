"""Gradient caching (arXiv 2101.06983): the contrastive batch is independent of the encoders' memory.

Micro-batches are first encoded without a graph; the objective turns all features into feature gradients; then each
micro-batch is encoded again with a graph, under the random numbers of its first pass, and back-propagated. With one
micro-batch the first pass keeps its graph and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuclip_scale.data.batch import Batch
from neuclip_scale.models.batch_norm import frozen_running_statistics
from neuclip_scale.models.clip import CLIPOutput

Encode = Callable[[Batch], CLIPOutput]


class MicroStep(Protocol):
    """An engine's context around one micro-batch."""

    def __call__(self, *, is_last: bool) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class RandomState:
    """The generators a forward pass draws from: CPU, and this rank's GPU."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Copy the current states."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextmanager
    def replayed(self, device: torch.device) -> Iterator[None]:
        """Draw the captured numbers again inside; go on outside as if nothing had been drawn."""
        present = RandomState.capture(device)
        self._restore(device)
        try:
            yield
        finally:
            present._restore(device)

    def _restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class CachedFeatures:
    """Features of one rank's batch, and the means to encode each micro-batch again with a graph."""

    def __init__(
        self, encode: Encode, module: nn.Module, micro_batches: Sequence[Batch], micro_step: MicroStep
    ) -> None:
        """Encode all micro-batches; `encode` runs the engine's module, `module` is the bare one.

        `micro_step` wraps each forward with a graph and its backward: engines decide before a forward whether to
        communicate.
        """
        self.micro_batches = micro_batches
        self._encode, self._micro_step = encode, micro_step
        self._kept: CLIPOutput | None = None
        self._random: list[RandomState] = []
        outputs = []
        if len(micro_batches) == 1:
            with micro_step(is_last=True):
                self._kept = encode(micro_batches[0])
            outputs.append(self._kept)
        else:
            # BatchNorm (RN50) must count each batch once: the pass with a graph does.
            with torch.no_grad(), frozen_running_statistics(module):
                for micro in micro_batches:
                    self._random.append(RandomState.capture(micro.images.device))
                    outputs.append(encode(micro))
        self.image = torch.cat([_detached(output.image_features) for output in outputs])  # [b, d]
        self.text = torch.cat([_detached(output.text_features) for output in outputs])  # [b, d]
        self.logit_scale = outputs[0].logit_scale.detach()  # [1]
        bias = outputs[0].logit_bias
        self.logit_bias = None if bias is None else bias.detach()  # [1]

    def replay(self) -> Iterator[tuple[slice, CLIPOutput]]:
        """Yield each micro-batch's rows of the batch and its output with a graph; back-propagate before the next."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            with self._micro_step(is_last=True):
                yield slice(0, self.image.shape[0]), kept
            return
        first = 0
        for micro, random in zip(self.micro_batches, self._random, strict=True):
            rows = slice(first, first + len(micro))
            first = rows.stop
            is_last = rows.stop == self.image.shape[0]
            with self._micro_step(is_last=is_last), random.replayed(micro.images.device):
                yield rows, self._encode(micro)


def _detached(features: Tensor | None) -> Tensor:
    assert features is not None, "both towers run in training"
    return features.detach()
