"""Block sizes of the Triton kernels, and which of them runs. Imported only where Triton runs: see `choosing`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from neuclip_scale.similarity import triton_kernels as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton, as it was imported, runs kernels in Python on any device."""
SLOT = 16 if INTERPRETED else 128
"""Smallest edge of a block of kernels that store sums; see `_store_parts`."""
LARGEST = 256
"""Largest edge of a block."""
EVEN_BLOCK = 32 if INTERPRETED else 128
"""A depth of which this is a divisor needs no masks, whatever the block."""
TUNED_FROM = 2048
"""Edge of a chunk from which blocks are tuned; below, no choice matters much, and sizes vary from chunk to chunk."""


class Blocks(NamedTuple):
    """What a kernel is compiled for, besides its form."""

    m: int
    n: int
    depth: int  # in 2-byte elements, half of it for fp32
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def sizes(self, item_size: int) -> dict[str, int]:
        """The kernel's block arguments."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.depth * 2 // item_size}


UNTUNED = Blocks(128, 128, 64, 8, 3)
"""Uses half of a Hopper multiprocessor's registers and memory for most kernels, so that one program's exponentials run
beside another's products."""
_NARROW = (UNTUNED, UNTUNED._replace(max_registers=128), UNTUNED._replace(num_warps=4))
_WIDE = (Blocks(256, 128, 64, 8, 3),)
_PRODUCT = (Blocks(64, 128, 64, 4, 4), Blocks(128, 256, 64, 8, 4))
_TUNED_BY = {
    "sums_kernel": ("d", "EXCLUDE", "COLUMNS", "INDIVIDUAL", "PRECISION"),
    "exponentials_kernel": ("d", "INDIVIDUAL", "PRECISION"),
    "sigmoids_kernel": ("d", "PRECISION"),
    "product_kernel": ("d", "TRANSPOSED", "ADD", "PRECISION"),
}


def launch(
    name: str, item_size: int, size: tuple[int, int, int], smallest_edge: int, *tensors_and_sizes: Any, **flags: Any
) -> None:
    """Run a kernel on blocks over `size` (rows, columns, splits), for operands of `item_size` bytes.

    `smallest_edge` of the chunk decides whether blocks are tuned.
    """
    kernel: Any = getattr(kernels, name)
    flags |= {"UPCAST": INTERPRETED, "GROUP": 8}
    if tunes(smallest_edge):
        kernel = tuned(name, item_size)
    else:
        flags |= fixed_block(item_size)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return -(-size[0] // meta["BLOCK_M"]) * -(-size[1] // meta["BLOCK_N"]), size[2]

    kernel[grid](*tensors_and_sizes, **flags)


def tunes(smallest_edge: int) -> bool:
    """Whether blocks are measured for such a chunk; else those of `fixed_block` are taken."""
    return not INTERPRETED and smallest_edge >= TUNED_FROM and not torch.are_deterministic_algorithms_enabled()


def candidates(name: str, item_size: int) -> tuple[Blocks, ...]:
    """What is measured: wide blocks only where their accumulators leave registers for the rest."""
    if item_size == 4 or name == "sigmoids_kernel":
        return _NARROW
    return _NARROW + _WIDE + (_PRODUCT if name == "product_kernel" else ())


def fixed_block(item_size: int) -> dict[str, int]:
    """The block sizes that are taken where nothing is tuned."""
    if INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
    return {**UNTUNED.sizes(item_size), "num_warps": UNTUNED.num_warps, "num_stages": UNTUNED.num_stages}


@cache
def tuned(name: str, item_size: int) -> Any:
    """The kernel with its block sizes measured on first use, once for each width, form and dtype.

    Triton keeps the measurements in its cache folder (TRITON_CACHE_DIR), where it can (Triton 3.4 on), so that other
    runs and ranks of the machine choose alike.
    """
    configs = [
        triton.Config(
            each.sizes(item_size), num_warps=each.num_warps, num_stages=each.num_stages, maxnreg=each.max_registers
        )
        for each in candidates(name, item_size)
    ]
    options: dict[str, Any] = {"restore_value": ["out"]} if name == "product_kernel" else {}
    autotune: Callable[..., Any] = triton.autotune
    if "cache_results" in inspect.signature(autotune).parameters:
        options["cache_results"] = True
    return autotune(configs, key=list(_TUNED_BY[name]), **options)(getattr(kernels, name))
