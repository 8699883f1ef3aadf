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
from neuclip_scale.models.triton_attention_kernels import (
    attention_kernel,
    attention_keys_kernel,
    attention_queries_kernel,
)
from neuclip_scale.similarity.triton_blocks import INTERPRETED

HEAD = Attention.FUSED_HEAD
BLOCK = 64
OPTIONS: dict[str, dict[str, int]] = {
    "attention_kernel": {"STEP": 64, "TAIL": 16, "num_warps": 4, "num_stages": 3},
    "attention_queries_kernel": {"STEP": 32, "TAIL": 16, "num_warps": 4, "num_stages": 3},
    "attention_keys_kernel": {"STEP": 32, "TAIL": 16, "num_warps": 4, "num_stages": 1},
}
"""The fastest at 197 and 257 tokens of those in docs/benchmarks/attention_h200.json."""


@triton_op("neuclip_scale::attention", mutates_args={})
def attention(qkv: Tensor, bias: Tensor, heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Self-attention of `qkv` [N, L, 3 heads HEAD], bf16 or fp16 -> [N, L, heads HEAD], and logarithms [N, heads, L],
    fp32, for the backward pass. `causal`: no token sees those behind it. Raises AssertionError for another size of a
    head.

    `bias` [3 heads HEAD] is the one already in `qkv`, whose gradient this returns: nothing else has to pass over
    `qkv`'s for it.
    """
    qkv = qkv.contiguous()
    count, tokens, width = qkv.shape
    out = qkv.new_empty(count, tokens, width // 3)
    levels = qkv.new_empty(count, heads, tokens, dtype=torch.float32)
    kernel = attention_kernel if INTERPRETED else wrap_triton(attention_kernel)
    _launch(kernel, "attention_kernel", qkv, heads, causal, out, levels)
    return out, levels


@triton_op("neuclip_scale::attention_backward", mutates_args={})
def attention_backward(
    dout: Tensor, out: Tensor, levels: Tensor, qkv: Tensor, heads: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """From `dout` and `out` [N, L, heads HEAD] and what else `attention` had and returned: the gradients of qkv
    [N, L, 3 heads HEAD], in its dtype, and of the bias [3 heads HEAD], fp32."""
    dout, out, levels, qkv = dout.contiguous(), out.contiguous(), levels.contiguous(), qkv.contiguous()
    dqkv, means = torch.empty_like(qkv), torch.empty_like(levels)
    sums = qkv.new_empty(qkv.shape[0], _blocks(qkv.shape[1]), qkv.shape[2], dtype=torch.float32)
    queries = attention_queries_kernel if INTERPRETED else wrap_triton(attention_queries_kernel)
    keys = attention_keys_kernel if INTERPRETED else wrap_triton(attention_keys_kernel)
    _launch(queries, "attention_queries_kernel", qkv, heads, causal, dqkv, sums, means, dout, out, levels)
    _launch(keys, "attention_keys_kernel", qkv, heads, causal, dqkv, sums, means, dout, levels)
    return dqkv, sums.sum((0, 1))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _launch(kernel: Any, name: str, qkv: Tensor, heads: int, causal: bool, *others: Tensor) -> None:
    """One program for each block of each head of each sequence."""
    count, tokens, width = qkv.shape
    assert width == 3 * heads * HEAD, "the kernels know one size of a head"
    programs = (count * heads * _blocks(tokens),)
    constants = {"HEAD": HEAD, "BLOCK": BLOCK, "CAUSAL": causal, "UPCAST": INTERPRETED}
    kernel[programs](*others, qkv, tokens, heads, **constants, **OPTIONS[name])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, ctx.heads, ctx.causal = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
    qkv, out, levels = ctx.saved_tensors
    dqkv, dbias = attention_backward(dout, out, levels, qkv, ctx.heads, ctx.causal)
    return dqkv, dbias.to(ctx.bias_dtype), None, None


attention.register_autograd(_backward, setup_context=_keep)
