"""Captions without most of their padding.

A batch's captions, shortest first, fall into a few groups of about one length. Each group is a rectangle of tokens,
and the rectangles lie end to end, [T, width] in place of [N, L, width]: linear layers and norms take all tokens at
once, and only attention, which asks which tokens belong together, goes from rectangle to rectangle.

Under CLIP's causal mask nothing before the end token sees what comes after it, so the features are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuclip_scale.transfers import to_device

MOST_RECTANGLES = 4
"""Every one has attention kernels of its own to start; four leave out most of what any number would."""
MULTIPLE = 8
"""Lengths are rounded up to it: what a GPU's matrix units take at once."""


Rectangles = tuple[tuple[int, int], ...]
"""Captions and tokens of each group."""


class Packing(NamedTuple):
    """Where the tokens of N captions lie. Passes through the engines' wrappers: tensors, tuples and integers only."""

    order: Tensor
    """[N] int64: the captions in packed order."""
    inverse: Tensor
    """[N] int64: each caption's place in it."""
    starts: Tensor
    """[N] int64: place of the first token of each caption in packed order."""
    rectangles: Rectangles

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids [N, L] -> [T]."""
        counts = [captions for captions, _ in self.rectangles]
        parts = tokens[self.order].split(counts)
        return torch.cat([part[:, :length].flatten() for part, (_, length) in zip(parts, self.rectangles, strict=True)])

    def split(self, x: Tensor) -> list[Tensor]:
        """[T, width] -> [captions, tokens, width] of each group, as views."""
        parts = x.split([captions * length for captions, length in self.rectangles])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.rectangles, strict=True)]


def join(parts: Sequence[Tensor]) -> Tensor:
    """The opposite of `Packing.split`."""
    return torch.cat([part.flatten(0, 1) for part in parts])


def pack(lengths: Sequence[int], context_length: int, device: torch.device, *, alike: bool = False) -> Packing | None:
    """The packing of captions of these lengths with the fewest tokens; None where padding costs nothing.

    `alike`: as many rectangles for every batch, for a compiler, to which another number is another program.
    """
    size = np.asarray(lengths)
    rounded = np.minimum(-(-size // MULTIPLE) * MULTIPLE, context_length)
    order = np.argsort(rounded, kind="stable")
    rectangles = fewest_tokens(*np.unique(rounded, return_counts=True))
    if rectangles == ((len(size), context_length),):
        return None
    if alike:
        rectangles = _of_one_kind(rectangles)
    each = np.repeat([length for _, length in rectangles], [captions for captions, _ in rectangles])
    starts = np.cumsum(each) - each
    # One copy to the device for all three.
    places = torch.from_numpy(np.stack([order, np.argsort(order, kind="stable"), starts]))
    in_order, inverse, first = to_device(places, device).unbind()
    return Packing(in_order, inverse, first, rectangles)


def fewest_tokens(lengths: np.ndarray, captions: np.ndarray) -> Rectangles:
    """At most `MOST_RECTANGLES` that hold `captions[i]` captions of `lengths[i]` tokens, ascending.

    By the best split of every prefix into every number of rectangles: there are ten lengths at most.
    """
    below = np.concatenate([[0], np.cumsum(captions)])
    # best[end]: the fewest tokens of the first `end` lengths so far, and the rectangles.
    best: dict[int, tuple[int, Rectangles]] = {0: (0, ())}
    for _ in range(MOST_RECTANGLES):
        found = dict(best)
        for start, (tokens, rectangles) in best.items():
            for end in range(start + 1, len(lengths) + 1):
                new = int(below[end] - below[start]), int(lengths[end - 1])
                total = tokens + new[0] * new[1]
                if end not in found or total < found[end][0]:
                    found[end] = total, (*rectangles, new)
        best = found
    return best[len(lengths)][1]


def _of_one_kind(rectangles: Rectangles) -> Rectangles:
    """`MOST_RECTANGLES` of them with two captions or more each, if there are as many: a size of one is a case of its
    own to a compiler. Captions move to longer rectangles only."""
    kept: list[tuple[int, int]] = []
    waiting = 0  # captions that went to the longer rectangle before
    for count, length in reversed(rectangles):
        count -= waiting
        waiting = int(count == 1)
        if count + waiting:
            kept.insert(0, (count + waiting, length))
    if waiting:  # the shortest is alone
        (_, length), *longer = kept
        kept = [(longer[0][0] + 1, longer[0][1]), *longer[1:]] if longer else [(1, length)]
    while len(kept) < MOST_RECTANGLES and max(kept)[0] > 3:
        largest = kept.index(max(kept))
        count, length = kept[largest]
        kept[largest : largest + 1] = [(count // 2, length), (count - count // 2, length)]
    return tuple(kept)
