"""A queue's sums through its Triton kernels. Imported only where Triton runs: see `choosing`.

Two launches for each side and no wait of the host. Of [B, K] nothing is in memory: for each strip of the queue, anchor
and horizon there is one sum, and strips are as few as keep `LIMITS.programs` programs at work. For bf16 products there
is a bf16 copy of the queue (`Rounded`): rounding it as it is read would take the tensor cores' loads through registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuclip_scale.normalizers import triton_queue_kernels as kernels
from neuclip_scale.normalizers.own_entries import OwnEntries
from neuclip_scale.normalizers.rounded import Rounded
from neuclip_scale.normalizers.triton_npn import how_multiplied, options_of
from neuclip_scale.similarity.triton_blocks import EVEN_BLOCK, Blocks

STRIP = Blocks(128, 128, 64, 8, 3, max_registers=128)
"""Two programs fit a Hopper multiprocessor, so that one's exponentials run beside the other's products."""
_LEAST_PLACES = 8
"""Horizons that the narrowest block of weights has room for, with their rests."""
_JOINED = 64
"""Anchors that a program of `join_kernel` holds."""


class Limits(NamedTuple):
    """Sizes that spread the work."""

    programs: int = 1024
    """About so many run, where the queue is long enough: some four for each place of an H100 or H200."""


LIMITS = Limits()


class FusedSums:
    """What both sides of a step's sums share: s_ii, which entries are an anchor's own, and the entries' weights."""

    def __init__(
        self, positives: Tensor, scale: Tensor, own: OwnEntries, weights: Tensor, limits: Limits = LIMITS
    ) -> None:
        """`positives` are [B], `weights` [K, H] and `own` those of the queue's first K slots, `scale` one element."""
        self.dtype, self.precision = how_multiplied()
        self.positives, self.scale = positives.contiguous(), scale.reshape(1).to(positives)
        self.anchor_codes, self.entry_codes = own.codes()
        (self.num_entries, self.num_horizons), self.limits = weights.shape, limits
        self.table = _table(weights)

    @torch.no_grad()
    def log_sums(self, anchors: Tensor, entries: Tensor, rounded: Rounded) -> Tensor:
        """log sum_q w_q exp(scale (x_i . q - s_ii)) for `anchors` [B, d] and `entries` [M/W, d], fp32 -> [B, H].

        `rounded` follows the entries.
        """
        num_anchors, columns = len(anchors), self.table.shape[1]
        log_sums = self.positives.new_empty(num_anchors, self.num_horizons)
        if not self.num_entries:
            return log_sums.fill_(-torch.inf)
        negatives = rounded.of(entries) if self.dtype == torch.bfloat16 else entries
        assert negatives.dtype == self.dtype, "the queue is fp32"
        assert negatives.is_contiguous(), "the kernels take rows without gaps"
        depth, strips = self._strips(num_anchors)
        sums = self.positives.new_empty(strips, num_anchors, columns)
        largest = self.positives.new_empty(strips, num_anchors)
        self._sum_strips(anchors.to(self.dtype).contiguous(), negatives, sums, largest, depth)
        _launch(
            kernels.join_kernel, (-(-num_anchors // _JOINED),), log_sums, sums, largest, self.positives, self.scale,
            num_anchors, strips, self.num_horizons, PLACES=columns // 2, ANCHORS=_JOINED, num_warps=4,
        )  # fmt: skip
        return log_sums

    def _sum_strips(self, anchors: Tensor, negatives: Tensor, sums: Tensor, largest: Tensor, depth: int) -> None:
        (num_anchors, d), options = anchors.shape, strip_options(anchors.element_size(), self.precision)
        assert num_anchors * d < 1 << 31
        _launch(
            kernels.strip_kernel, (-(-num_anchors // options["BLOCK_M"]) * len(sums),), anchors, negatives, self.table,
            sums, largest, self.scale, self.anchor_codes, self.entry_codes, num_anchors, self.num_entries, d, depth,
            COLUMNS=self.table.shape[1], RESTS=self.dtype != torch.bfloat16, EVEN=d % EVEN_BLOCK == 0,
            PRECISION=self.precision, **options,
        )  # fmt: skip

    def _strips(self, num_anchors: int) -> tuple[int, int]:
        """Entries of a strip, whole blocks, and how many strips there are."""
        options = strip_options(self.dtype.itemsize, self.precision)
        wanted = -(-self.limits.programs // -(-num_anchors // options["BLOCK_M"]))
        block = options["BLOCK_N"]
        depth = -(-self.num_entries // (wanted * block)) * block
        return depth, -(-self.num_entries // depth)


def strip_options(item_size: int, precision: str) -> dict[str, Any]:
    """What `strip_kernel` is compiled with for operands of `item_size` bytes."""
    options = options_of(STRIP, item_size, precision)
    del options["GROUP"]
    return options


def _table(weights: Tensor) -> Tensor:
    """Weights [K, H] in bf16 and what rounding took from them, each padded with zeros to P columns -> [K, 2 P]."""
    count, num_horizons = weights.shape
    places = max(_LEAST_PLACES, 1 << (num_horizons - 1).bit_length())
    table = weights.new_zeros(count, 2, places, dtype=torch.bfloat16)
    rounded = weights.to(torch.bfloat16)
    table[:, 0, :num_horizons] = rounded
    table[:, 1, :num_horizons] = weights - rounded
    return table.view(count, 2 * places)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
    kernel[grid](*arguments, **flags)
