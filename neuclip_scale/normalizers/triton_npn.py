"""The NPN's updates and predictions through its Triton kernels. Imported only where Triton runs: see `choosing`.

An update of b anchors and m prototypes is four launches, two products of 2 b m d FLOPs and no wait of the host. Of
[m, b] there is one buffer of exponentials, bf16 for bf16 products and fp32 for others, shared by all updates of a step;
more anchors than it has room for come in chunks. Weights and accumulators stay fp32.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.normalizers import triton_npn_kernels as kernels
from neuclip_scale.similarity.chunks import num_splits
from neuclip_scale.similarity.triton_blocks import EVEN_BLOCK, INTERPRETED, Blocks

if TYPE_CHECKING:
    from neuclip_scale.normalizers.npn import NormalizerPredictionNetwork

WEIGH, PULL = Blocks(128, 128, 64, 8, 3, max_registers=128), Blocks(128, 128, 64, 8, 4)
"""Two programs of `weigh_kernel` fit a Hopper multiprocessor, so that one's exponentials run beside the other's
products. `pull_kernel` has hardly more programs than there are multiprocessors."""
FACTOR_BLOCK = 32 if INTERPRETED else WEIGH.n
"""Prototypes whose exponentials are relative to the same logit."""
_JOINED = 32
"""Blocks, and anchors, that a program of `factors_kernel` holds at once."""


class Limits(NamedTuple):
    """Sizes that bound the memory and spread the work."""

    weight_bytes: int = 64 << 20
    """Memory of the exponentials."""
    split_anchors: int = 1024
    """Least number of anchors whose sum is left to one program; see `num_splits`."""


LIMITS = Limits()


@torch.no_grad()
def updates(
    npn: NormalizerPredictionNetwork,
    batch: FusedBatch,
    target: Tensor,
    *,
    num_updates: int,
    learning_rate: float,
    eps: float,
) -> Iterator[Tensor]:
    """AdaGrad's steps towards `target` [b], log(eps + g); `eps` is AdaGrad's.

    Where there are several ranks, yields each update's gradient [m, d], to be summed over them before the next is asked
    for; at the end the prototypes.
    """
    target, total = target.contiguous(), torch.empty_like(npn.weight)
    ranks = distributed.world_size()
    for _ in range(num_updates):
        batch.local_gradient(target, total, len(target) * ranks)
        if ranks > 1:
            yield total
        batch.descend(total, learning_rate, eps)
    yield npn.weight


@torch.no_grad()
def replayed_updates(
    npn: NormalizerPredictionNetwork,
    anchors: Tensor,
    positive_similarity: Tensor,
    temperature: Tensor | float,
    sample_index: Tensor | None,
    target: Tensor,
    *,
    num_updates: int,
    learning_rate: float,
    eps: float,
) -> Iterator[None]:
    """See `NormalizerPredictionNetwork.updates` (collective); the rest as in `updates`, started as CUDA graphs.

    One rank's updates are one graph. Of several ranks each update ends in one, for its gradient travels.
    """

    def work(*batch: Any) -> Iterator[Tensor]:
        fused = FusedBatch(npn, *batch[:4])
        yield from updates(npn, fused, batch[4], num_updates=num_updates, learning_rate=learning_rate, eps=eps)

    num_sums = num_updates if distributed.world_size() > 1 else 0
    inputs = anchors, positive_similarity, _tau(anchors, temperature), sample_index, target
    kind = _kind(npn, "NPN's updates", num_updates, learning_rate, eps, num_sums)
    parts = npn.replays.run(work, inputs, kind, num_sums + 1)
    for _ in range(num_sums):
        finish = distributed.start_all_reduce_sum(next(parts))
        yield
        finish()
    for _ in parts:  # to the end
        pass


@torch.no_grad()
def replayed_prediction(
    npn: NormalizerPredictionNetwork,
    anchors: Tensor,
    positive_similarity: Tensor,
    temperature: Tensor | float,
    sample_index: Tensor | None,
) -> Tensor:
    """See `NormalizerPredictionNetwork.forward`; started as a CUDA graph."""

    def work(*batch: Any) -> Iterator[Tensor]:
        yield FusedBatch(npn, *batch).predict()

    inputs = anchors, positive_similarity, _tau(anchors, temperature), sample_index
    (predicted,) = npn.replays.run(work, inputs, _kind(npn, "NPN's prediction"))
    return predicted.clone()  # the graph writes to the same memory again


class FusedBatch:
    """The anchors of a step as the kernels take them, the prototypes' directions, and memory between the two."""

    def __init__(
        self,
        npn: NormalizerPredictionNetwork,
        anchors: Tensor,
        positive_similarity: Tensor,
        temperature: Tensor | float,
        sample_index: Tensor | None,
        limits: Limits = LIMITS,
    ) -> None:
        """`anchors` [b, d] fp32, and what else `NormalizerPredictionNetwork.updates` takes."""
        dtype, self.precision = how_multiplied()
        self.npn, self.limits = npn, limits
        self.anchors = anchors.to(dtype).contiguous()
        # Tensor cores take fp32 with the summed dimension innermost only.
        self.summed = self.anchors if dtype != torch.float32 else self.anchors.T.contiguous().T  # [b, d]
        self.directions = F.normalize(npn.weight, dim=1).to(dtype)  # [m, d], kept up to date
        scale = 1 / temperature
        self.scale = scale.reshape(1) if isinstance(scale, Tensor) else anchors.new_full((1,), scale)
        self.sample_index = None if sample_index is None else sample_index.to(torch.int64).contiguous()
        self.shift = (-positive_similarity * self.scale - self._log_counts()).contiguous()  # [b]
        num_prototypes, num_anchors = npn.num_prototypes, len(anchors)
        height = limits.weight_bytes // (num_prototypes * self.anchors.element_size())
        self.height = min(max(height // EVEN_BLOCK, 1) * EVEN_BLOCK, num_anchors)
        parts = self.shift.new_empty(2, -(-num_prototypes // FACTOR_BLOCK), self.height)
        self.largest, self.sums = parts  # of each block of prototypes and anchor
        assert max(num_prototypes, self.height) * anchors.shape[1] < 1 << 31
        assert num_prototypes * self._weights_stride < 1 << 31

    @property
    def _weights_stride(self) -> int:
        return -(-self.height // 64) * 64  # whole cache lines

    def predict(self) -> Tensor:
        """log(eps + exp(log-mean-exp)) of every anchor -> [b]."""
        predicted = torch.empty_like(self.shift)
        for rows in self._chunks():
            self._weigh(rows, None)
            self._factors(rows, predicted[rows], None)
        return predicted

    def local_gradient(self, target: Tensor, total: Tensor, num_anchors: int) -> None:
        """Fill `total` [m, d] with this rank's part of the gradient for the directions, of a mean over `num_anchors`.

        `target` [b] is log(eps + g).
        """
        weights = self.anchors.new_empty(self.npn.num_prototypes, self._weights_stride)
        for rows in self._chunks():
            self._weigh(rows, weights)
            self._factors(rows, None, target[rows], 1 / num_anchors)
            self._pull(rows, weights, total)

    def descend(self, total: Tensor, learning_rate: float, eps: float) -> None:
        """Take AdaGrad's step along a gradient for the directions."""
        num_prototypes, d = total.shape
        block = 1 << (d - 1).bit_length()
        rows = 32 if INTERPRETED else max(1, 2048 // block)
        _launch(
            kernels.adagrad_kernel, (-(-num_prototypes // rows),), self.npn.weight, self.npn.squares, total,
            self.directions, float(learning_rate), eps, num_prototypes, d, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip

    def _chunks(self) -> Iterator[slice]:
        num_anchors = len(self.anchors)
        for first in range(0, num_anchors, self.height):
            yield slice(first, min(first + self.height, num_anchors))

    def _weigh(self, rows: slice, weights: Tensor | None) -> None:
        anchors, own = self.anchors[rows], self.sample_index is not None
        (num_anchors, d), num_prototypes = anchors.shape, self.npn.num_prototypes
        options = options_of(WEIGH, anchors.element_size(), self.precision)
        tiles = -(-num_anchors // options["BLOCK_M"]) * -(-num_prototypes // options["BLOCK_N"])
        _launch(
            kernels.weigh_kernel, (tiles,), anchors, self.directions, anchors if weights is None else weights,
            self.largest, self.sums, self.scale,
            self.npn.prototype_index if self.sample_index is None else self.sample_index[rows],
            self.npn.prototype_index, num_anchors, num_prototypes, d, 0 if weights is None else weights.stride(0),
            OWN=own, STORE=weights is not None, EVEN=d % EVEN_BLOCK == 0, PRECISION=self.precision, **options,
        )  # fmt: skip

    def _factors(self, rows: slice, predicted: Tensor | None, target: Tensor | None, share: float = 0.0) -> None:
        """Predictions where there is room for them; else factors, in the place of `largest`, times `share`."""
        shift = self.shift[rows]
        _launch(
            kernels.factors_kernel, (-(-len(shift) // _JOINED),), self.largest, self.sums, shift,
            shift if target is None else target, shift if predicted is None else predicted, self.scale,
            self.npn.log_eps, share, len(shift), len(self.largest),
            PREDICT=predicted is not None, ANCHORS=_JOINED, BLOCKS=_JOINED, num_warps=4,
        )  # fmt: skip

    def _pull(self, rows: slice, weights: Tensor, total: Tensor) -> None:
        """Write, or from the second chunk on add, a chunk's part of the gradient."""
        anchors, (num_prototypes, d) = self.summed[rows], total.shape
        num_anchors, options = len(anchors), options_of(PULL, weights.element_size(), self.precision)
        tiles = -(-num_prototypes // options["BLOCK_M"]) * -(-d // options["BLOCK_N"])
        splits = num_splits(tiles, num_anchors, self.limits.split_anchors)
        depth = -(-num_anchors // (splits * EVEN_BLOCK)) * EVEN_BLOCK if splits > 1 else num_anchors
        splits = -(-num_anchors // depth)
        out = total if splits == 1 else total.new_empty(splits, num_prototypes, d)
        _launch(
            kernels.pull_kernel, (tiles, splits), out, weights, self.largest, anchors,
            num_prototypes, num_anchors, d, depth, num_prototypes * d, weights.stride(0), *anchors.stride(),
            ADD=splits == 1 and rows.start > 0, FACTOR_BLOCK=FACTOR_BLOCK,
            EVEN=num_anchors % EVEN_BLOCK == 0 and depth % EVEN_BLOCK == 0, PRECISION=self.precision, **options,
        )  # fmt: skip
        if splits > 1 and rows.start:
            total += out.sum(0)
        elif splits > 1:
            torch.sum(out, 0, out=total)

    def _log_counts(self) -> Tensor:
        """log of each anchor's number of prototypes [b] that are not its own, of one at least."""
        origins = self.npn.prototype_index
        if self.sample_index is None:
            return self.scale.new_full((1,), len(origins)).log_()
        ordered = origins.sort().values
        last = torch.searchsorted(ordered, self.sample_index, right=True)
        own = last - torch.searchsorted(ordered, self.sample_index)
        return (len(origins) - own).clamp_min_(1).to(self.scale.dtype).log_()


def _tau(anchors: Tensor, temperature: Tensor | float) -> Tensor:
    return temperature if isinstance(temperature, Tensor) else anchors.new_full((1,), temperature)


def _kind(npn: NormalizerPredictionNetwork, *what: Hashable) -> tuple[Hashable, ...]:
    """What, beside a batch's sizes, decides which kernels run and where in memory."""
    return *what, torch.get_float32_matmul_precision(), *(buffer.data_ptr() for buffer in npn.buffers())


def how_multiplied() -> tuple[torch.dtype, str]:
    """Dtype of the operands and Triton's precision for `torch.set_float32_matmul_precision`: see `triton_sweeps`."""
    wanted = torch.get_float32_matmul_precision()
    if wanted == "medium":
        return torch.bfloat16, "ieee"
    return torch.float32, "tf32" if wanted == "high" else "tf32x3"


def options_of(blocks: Blocks, item_size: int, precision: str) -> dict[str, Any]:
    """What a product's kernel is compiled with for operands of `item_size` bytes."""
    if INTERPRETED:
        return {"BLOCK_M": FACTOR_BLOCK, "BLOCK_N": FACTOR_BLOCK, "BLOCK_K": EVEN_BLOCK, "UPCAST": True, "GROUP": 8}
    warps: dict[str, int | None] = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    if precision != "tf32x3":  # which splits its operands in registers and needs them all
        warps["maxnreg"] = blocks.max_registers
    return {**blocks.sizes(item_size), **warps, "UPCAST": False, "GROUP": 8}


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
    kernel[grid](*arguments, **flags)
