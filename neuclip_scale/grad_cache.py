"""Gradient caching (arXiv 2101.06983): the contrastive batch is independent of the encoders' memory.

Micro-batches are first encoded without a graph; the objective turns all features into feature gradients; then each
micro-batch is encoded again with a graph, under the random numbers of its first pass, and back-propagated. With one
micro-batch the first pass keeps its graph and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip_scale.data.batch import Batch
from neuclip_scale.models.batch_norm import frozen_running_statistics
from neuclip_scale.models.clip import CLIPOutput

Encode = Callable[[Batch], CLIPOutput]


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

    def __init__(self, encode: Encode, module: nn.Module, micro_batches: Sequence[Batch]) -> None:
        """Encode all micro-batches; `encode` runs the engine's module, `module` is the bare one."""
        self.micro_batches = micro_batches
        self._encode = encode
        self._kept: CLIPOutput | None = None
        self._random: list[RandomState] = []
        outputs = []
        if len(micro_batches) == 1:
            self._kept = encode(micro_batches[0])
            outputs.append(self._kept)
        else:
            # BatchNorm (RN50) must count each batch once: the pass with a graph does.
            with torch.no_grad(), frozen_running_statistics(module):
                for micro in micro_batches:
                    self._random.append(RandomState.capture(micro.images.device))
                    outputs.append(encode(micro))
        self.image = torch.cat([output.image_features.detach() for output in outputs])  # [b, d]
        self.text = torch.cat([output.text_features.detach() for output in outputs])  # [b, d]
        self.logit_scale = outputs[0].logit_scale.detach()  # [1]

    def replay(self) -> Iterator[tuple[slice, CLIPOutput]]:
        """Yield each micro-batch's rows of the batch and its output with a graph; back-propagate before the next."""
        first = 0
        for index, micro in enumerate(self.micro_batches):
            rows = slice(first, first + micro.images.shape[0])
            first = rows.stop
            if self._kept is not None:
                kept, self._kept = self._kept, None
                yield rows, kept
                return
            with self._random[index].replayed(micro.images.device):
                output = self._encode(micro)
            yield rows, output
