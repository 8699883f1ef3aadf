"""An MLP's bias and GELU as one operator of torch, by Triton. Imported only where Triton runs: see `fused`.

A compiler sees an operator that it neither splits nor computes twice; the forward pass keeps its input and, for the
layer that follows, its output, as without it.

`wrap_triton` stands in each operator, by the kernel's name: there torch looks for the kernels that a program which it
keeps on disk depends on. The interpreter's kernels have nothing that a compiler could take in.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from neuclip_scale.models.triton_gelu_kernels import gelu_backward_kernel, gelu_kernel
from neuclip_scale.similarity.triton_blocks import INTERPRETED

FORWARD: dict[str, int] = {"BLOCK_M": 8, "BLOCK_N": 512, "num_warps": 4}
BACKWARD: dict[str, int] = {"BLOCK_M": 8, "BLOCK_N": 512, "STAGES": 2, "num_warps": 4}
CHUNK_ROWS = 64
"""Of a program that adds up the bias's gradient; its sums are a fiftieth of what it reads and writes."""


@triton_op("neuclip_scale::bias_gelu", mutates_args={})
def bias_gelu(x: Tensor, bias: Tensor, quick: bool) -> Tensor:
    """gelu(x + bias), exact or `quick`, for x [*, width] and bias [width] of any floating-point dtypes but fp64, in x's
    dtype.
    """
    rows = x.contiguous().view(-1, x.shape[-1])
    out = torch.empty_like(rows)
    kernel = gelu_kernel if INTERPRETED else wrap_triton(gelu_kernel)
    _launch(kernel, FORWARD["BLOCK_M"], FORWARD, quick, out, rows, bias.contiguous(), *rows.shape)
    return out.view(x.shape)


@triton_op("neuclip_scale::bias_gelu_backward", mutates_args={})
def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor, quick: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the bias, fp32."""
    rows, slopes = x.contiguous().view(-1, x.shape[-1]), dout.contiguous().view(-1, x.shape[-1])
    dx = torch.empty_like(rows)
    sums = rows.new_empty(-(-rows.shape[0] // CHUNK_ROWS), rows.shape[1], dtype=torch.float32)
    kernel = gelu_backward_kernel if INTERPRETED else wrap_triton(gelu_backward_kernel)
    _launch(
        kernel, CHUNK_ROWS, BACKWARD, quick,
        dx, sums, slopes, rows, bias.contiguous(), *rows.shape, CHUNK_ROWS,
    )  # fmt: skip
    return dx.view(x.shape), sums.sum(0)


def _launch(kernel: Any, rows: int, options: dict[str, int], quick: bool, out: Tensor, *arguments: Any) -> None:
    """One program for so many rows of `out` and each block of columns."""
    grid = (triton.cdiv(out.shape[0], rows), triton.cdiv(out.shape[1], options["BLOCK_N"]))
    kernel[grid](out, *arguments, QUICK=quick, **options)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    *kept, ctx.quick = inputs
    ctx.save_for_backward(*kept)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
    x, bias = ctx.saved_tensors
    dx, dbias = bias_gelu_backward(dout, x, bias, ctx.quick)
    return dx, dbias.to(bias.dtype), None


bias_gelu.register_autograd(_backward, setup_context=_keep)
