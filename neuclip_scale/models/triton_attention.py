"""Attention over short sequences as one operator of torch, by Triton. Imported only where Triton runs: see `fused`.

`wrap_triton` stands in each operator, by the kernel's name: there torch looks for the kernels that a program which it
keeps on disk depends on. The interpreter's kernels have nothing that a compiler could take in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from neuclip_scale.models.transformer import Attention
from neuclip_scale.models.triton_attention_kernels import attention_backward_kernel, attention_kernel
from neuclip_scale.similarity.triton_blocks import INTERPRETED

HEAD, MAX_TOKENS = Attention.FUSED_HEAD, Attention.FUSED_TOKENS[1]
FORWARD: dict[str, int] = {"QUERIES": 64, "num_warps": 4, "num_stages": 3}
BACKWARD: dict[str, int] = {"QUERIES": 32, "num_warps": 8, "num_stages": 3}


@triton_op("neuclip_scale::attention", mutates_args={})
def attention(qkv: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Self-attention of `qkv` [N, L, 3 heads HEAD], bf16 or fp16 -> [N, L, heads HEAD], and logarithms for the backward
    pass.

    `bias` [3 heads HEAD] is the one already in `qkv`, whose gradient this returns: nothing else has to pass over
    `qkv`'s for it.
    """
    qkv = qkv.contiguous()
    count, tokens, width = qkv.shape
    out = qkv.new_empty(count, tokens, width // 3)
    levels = qkv.new_empty(count, heads, tokens, dtype=torch.float32)
    kernel = attention_kernel if INTERPRETED else wrap_triton(attention_kernel)
    _launch(kernel, FORWARD, qkv, heads, out, levels)
    return out, levels


@triton_op("neuclip_scale::attention_backward", mutates_args={})
def attention_backward(dout: Tensor, out: Tensor, levels: Tensor, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, in its dtype, and of the bias, fp32."""
    qkv = qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    sums = qkv.new_empty(qkv.shape[0], qkv.shape[2], dtype=torch.float32)
    given = (each.contiguous() for each in (dout, out, levels))
    kernel = attention_backward_kernel if INTERPRETED else wrap_triton(attention_backward_kernel)
    _launch(kernel, BACKWARD, qkv, heads, dqkv, sums, *given)
    return dqkv, sums.sum(0)


def _launch(kernel: Any, options: dict[str, int], qkv: Tensor, heads: int, *others: Tensor) -> None:
    """One program for each head of each sequence."""
    count, tokens, width = qkv.shape
    assert width == 3 * heads * HEAD, "the kernels know one size of a head"
    assert tokens <= MAX_TOKENS, "the kernels hold all keys at once"
    kernel[(count * heads,)](*others, qkv, tokens, heads, KEYS=MAX_TOKENS, HEAD=HEAD, UPCAST=INTERPRETED, **options)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, ctx.heads = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
    qkv, out, levels = ctx.saved_tensors
    dqkv, dbias = attention_backward(dout, out, levels, qkv, ctx.heads)
    return dqkv, dbias.to(ctx.bias_dtype), None


attention.register_autograd(_backward, setup_context=_keep)
