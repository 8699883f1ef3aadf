"""Gradient caching (arXiv 2101.06983): the contrastive batch is independent of the encoders' memory.

Micro-batches are first encoded without a graph; the objective turns all features into feature gradients; then each
micro-batch is encoded again with a graph, under the random numbers of its first pass, and back-propagated. What
memory allows to keep from the first pass is not computed twice; with one micro-batch that is everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from neuclip_scale.config import TrainConfig
from neuclip_scale.data.batch import Batch
from neuclip_scale.distributed import RowGathering, rank, world_size
from neuclip_scale.models.batch_norm import frozen_running_statistics
from neuclip_scale.models.clip import CLIPOutput, Towers, joined_projections
from neuclip_scale.similarity import PairFeatures, RingPairs


class Encode(Protocol):
    """An engine's forward pass of both towers or of one."""

    def __call__(self, batch: Batch, towers: Towers = "both") -> CLIPOutput: ...


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

    @classmethod
    def kept(cls, device: torch.device) -> AbstractContextManager[None]:
        """Inside, nothing is taken from the generators that dropout draws from.

        A DataLoader takes its seed there when it starts: a resumed run, and one that measures more, would drop out
        other units.
        """
        return cls.capture(device).replayed(device)

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


@dataclass(frozen=True)
class KeptActivations:
    """Which graphs of the first pass are kept, where there are several micro-batches.

    The first ones are: so all micro-batches are back-propagated, and count in BatchNorm's running statistics, in the
    order in which they were encoded, and the last, in whose backward pass engines reduce the gradients, is encoded just
    before it.
    """

    micro_batches: int = 0
    """Micro-batches of which both towers' are kept."""
    tower: Literal["", "image", "text"] = ""
    """A tower of which all are kept."""

    @classmethod
    def of(cls, section: TrainConfig, num_micro_batches: int) -> KeptActivations:
        """Those of a recipe; everything where there is one micro-batch."""
        if num_micro_batches == 1:
            return cls(1)
        return cls(section.kept_micro_batches, section.kept_tower)

    def passes(self, number: int) -> list[tuple[Towers, bool]]:
        """The forward passes of a micro-batch, and whether each keeps its graph. The image tower comes first, as in a
        pass of both: dropout draws the same numbers.
        """
        if number < self.micro_batches or not self.tower:
            return [("both", number < self.micro_batches)]
        return [("image", self.tower == "image"), ("text", self.tower == "text")]


@dataclass
class _Pass:
    """A forward pass of the first encoding."""

    towers: Towers
    random: RandomState
    """The generators before it."""
    kept: CLIPOutput | None
    """What it gave, with its graph."""


class CachedFeatures:
    """Features of one rank's batch and of all ranks', and the means to encode each micro-batch again with a graph."""

    def __init__(
        self,
        encode: Encode,
        module: nn.Module,
        micro_batches: Sequence[Batch],
        micro_step: MicroStep,
        keep: KeptActivations | None = None,
        *,
        gather: bool = True,
    ) -> None:
        """Encode all micro-batches (collective); `encode` runs the engine's module, `module` is the bare one.

        `micro_step` wraps each forward with a graph and its backward: engines decide before a forward whether to
        communicate. A single micro-batch keeps its graph, whatever `keep` says. Without `gather` ranks keep their
        features for themselves.
        """
        self.micro_batches = micro_batches
        self._encode, self._module, self._micro_step = encode, module, micro_step
        self._keep = KeptActivations(1) if len(micro_batches) == 1 else keep or KeptActivations()
        self._passes: list[list[_Pass]] = []
        image, text = (RowGathering(sum(map(len, micro_batches))) for _ in range(2))
        outputs: list[CLIPOutput] = []
        for number in range(len(micro_batches)):
            output = self._first_pass(number)
            outputs.append(output.with_maps_of(outputs[0]) if outputs else output)
            if gather:
                image.add(outputs[-1].both()[0])
                text.add(outputs[-1].both()[1])
        images, texts = zip(*(output.both() for output in outputs), strict=True)
        self.image, self.text = torch.cat(images), torch.cat(texts)  # [b, d]
        self.pairs: PairFeatures
        if gather or world_size() == 1:
            world = image.result(self.image), text.result(self.text)  # [B, d]
            first = rank() * len(self.image)
            self.pairs = PairFeatures(self.image, self.text, *world, first, joined_projections(outputs))
        else:
            self.pairs = RingPairs.local(self.image, self.text)
        self.logit_scale = outputs[0].logit_scale  # [1]
        self.logit_bias = outputs[0].logit_bias  # [1]

    def replay(self) -> Iterator[tuple[slice, CLIPOutput]]:
        """Yield each micro-batch's rows of the batch and its output with a graph; back-propagate before the next."""
        first = 0
        for number, micro in enumerate(self.micro_batches):
            rows = slice(first, first + len(micro))
            first = rows.stop
            with self._micro_step(is_last=rows.stop == self.image.shape[0]), ExitStack() as stack:
                yield rows, self._again(number, stack)

    def _first_pass(self, number: int) -> CLIPOutput:
        """A micro-batch's output without a graph."""
        micro, passes, outputs = self.micro_batches[number], list[_Pass](), list[CLIPOutput]()
        for towers, keeps in self._keep.passes(number):
            random = RandomState.capture(micro.images.device)
            if keeps:
                # Gradients are reduced after the last forward pass with a graph, which is another one but here.
                with self._micro_step(is_last=len(self.micro_batches) == 1):
                    output = self._encode(micro, towers)
            else:
                # BatchNorm (RN50) must count each batch once: the pass with a graph does.
                with torch.no_grad(), frozen_running_statistics(self._module):
                    output = self._encode(micro, towers)
            passes.append(_Pass(towers, random, output.without_maps() if keeps else None))
            outputs.append(_detached(output))
        self._passes.append(passes)
        return _joined(outputs)

    def _again(self, number: int, stack: ExitStack) -> CLIPOutput:
        """A micro-batch's output with a graph; in the stack the generators stand where its passes left them."""
        micro, outputs = self.micro_batches[number], list[CLIPOutput]()
        for each in self._passes[number]:
            if each.kept is not None:
                outputs.insert(0, each.kept)
                each.kept = None
            else:
                stack.enter_context(each.random.replayed(micro.images.device))
                outputs.append(self._encode(micro, each.towers))
        return _joined(outputs)


def _joined(outputs: Sequence[CLIPOutput]) -> CLIPOutput:
    """Features of the pass that gave them; scalars of the last one."""
    *others, last = outputs
    for other in others:
        last = last._replace(
            image_features=other.image_features if last.image_features is None else last.image_features,
            text_features=other.text_features if last.text_features is None else last.text_features,
            image_projection=last.image_projection or other.image_projection,
            text_projection=last.text_projection or other.text_projection,
        )
    return last


def _detached(output: CLIPOutput) -> CLIPOutput:
    image, text, scale, bias, *projections = output
    image, text, bias = (None if part is None else part.detach() for part in (image, text, bias))
    return CLIPOutput(image, text, scale.detach(), bias, *projections)
