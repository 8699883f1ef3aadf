"""The pre-norm transformer that CLIP's image and text towers share, with open_clip's parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuclip_scale.models.packing import Packing, join


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 whatever the input's and the weights' dtype; keeps the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


FUSED_DTYPES = (torch.bfloat16,)
"""What kernels of our own are tried with before they are chosen (`fused`)."""


class LinearGELU(nn.Linear):
    """gelu(x weight^T + bias), [*, in] -> [*, out].

    `quick`: x sigmoid(1.702 x), the approximation that OpenAI's weights were trained with. `fused`: bias and GELU are
    one kernel, and so are their gradients (`triton_gelu`), where the product is of `FUSED_DTYPES`.
    """

    fused = False

    def __init__(self, in_features: int, out_features: int, *, quick: bool) -> None:
        super().__init__(in_features, out_features)
        self.quick = quick

    def extra_repr(self) -> str:
        """See `Attention.extra_repr`."""
        return f"{super().extra_repr()}, quick={self.quick}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return gelu(super().forward(x), quick=self.quick)
        y = F.linear(x, self.weight)
        if y.dtype not in FUSED_DTYPES:
            return gelu(y + self.bias, quick=self.quick)
        fused: Tensor = torch.ops.neuclip_scale.bias_gelu(y, self.bias, self.quick)
        return fused


def gelu(x: Tensor, *, quick: bool) -> Tensor:
    """x times the normal law's distribution at x, or `quick`, the logistic law's at 1.702 x."""
    return x * torch.sigmoid(1.702 * x) if quick else F.gelu(x)


At = int | Tensor | None
"""A token of each sequence: its place, one place for each [N], or None for all tokens."""


def tokens_at(x: Tensor, at: At, packing: Packing | None = None) -> Tensor:
    """Those tokens of x [N, L, width], or [T, width] if packed: [N, width], or x itself."""
    if at is None:
        return x
    if packing is not None:
        return x[packing.starts + at]
    return x[:, at] if isinstance(at, int) else x[torch.arange(len(x), device=x.device), at]


class Attention(nn.Module):
    """Multi-head self-attention, [N, L, width] -> [N, L, width]; `at` one token of each sequence, [N, width].

    With a `packing` of the sequences, x is [T, width].

    Parameter names, shapes and initial values are those of `nn.MultiheadAttention`, which open_clip uses:
    Glorot uniform for the joint query, key and value matrix, zero biases, PyTorch's default for the output
    matrix. `fused`: sequences of `FUSED_TOKENS` at most, in one of `FUSED_DTYPES`, have a kernel (`triton_attention`).
    """

    fused = False
    FUSED_TOKENS = 577
    """ViT-L/14's at 336 pixels. Where more are, a general kernel has as few to spare."""
    FUSED_HEAD = 64
    """Numbers of a head."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width = {width}: not a multiple of heads = {heads}. Change one of them.")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values, after those of `out_proj`."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """What weights do not show: models are told apart by it."""
        return f"heads={self.heads}, causal={self.causal}"

    def forward(self, x: Tensor, at: At = None, packing: Packing | None = None) -> Tensor:
        if at is not None:
            return self._of_one(x, at, packing)
        qkv, fused = self._project(x, packing)
        if packing is None:
            return self.out_proj(self._attend(qkv, fused))
        return self.out_proj(join([self._attend(part, fused) for part in packing.split(qkv)]))

    def _project(self, x: Tensor, packing: Packing | None) -> tuple[Tensor, bool]:
        """Queries, keys and values [N, L, 3 width], or [T, 3 width], and whether the kernel takes them."""
        longest = x.shape[1] if packing is None else max(length for _, length in packing.rectangles)
        if self.fused and longest <= self.FUSED_TOKENS:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias.detach())  # whose gradient the kernel gives
            if qkv.dtype in FUSED_DTYPES:
                return qkv, True
        return F.linear(x, self.in_proj_weight, self.in_proj_bias), False

    def _attend(self, qkv: Tensor, fused: bool) -> Tensor:
        """[N, L, 3 width] -> [N, L, width]."""
        if fused:
            values: Tensor = torch.ops.neuclip_scale.attention(qkv, self.in_proj_bias, self.heads, self.causal)[0]
            return values
        N, L, _ = qkv.shape
        # Parts of the last dimension: their gradients go back by one copy, those of a permuted view by two.
        q, k, v = (part.view(N, L, self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return y.transpose(1, 2).reshape(N, L, -1)

    def _of_one(self, x: Tensor, at: int | Tensor, packing: Packing | None) -> Tensor:
        """One query for each sequence, so a product of queries less and hardly any attention."""
        width = x.shape[-1]
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            part.split([width, 2 * width]) for part in (self.in_proj_weight, self.in_proj_bias)
        )
        q = F.linear(tokens_at(x, at, packing), q_weight, q_bias)  # [N, width]
        kv = F.linear(x, kv_weight, kv_bias)
        if packing is None:
            return self.out_proj(self._look_up(q, kv, at))
        assert isinstance(at, Tensor)
        counts = [sequences for sequences, _ in packing.rectangles]
        parts = zip(q.split(counts), packing.split(kv), at.split(counts), strict=True)
        return self.out_proj(torch.cat([self._look_up(*part) for part in parts]))

    def _look_up(self, q: Tensor, kv: Tensor, at: int | Tensor) -> Tensor:
        """[N, width] and [N, L, 2 width] -> [N, width]."""
        N, L, _ = kv.shape
        k, v = (part.view(N, L, self.heads, -1).transpose(1, 2) for part in kv.chunk(2, dim=-1))
        mask = None
        if self.causal:
            last = at if isinstance(at, int) else at[:, None]
            seen = torch.arange(L, device=kv.device) <= last  # [L] or [N, L]
            mask = seen.expand(N, L)[:, None, None]
        y = F.scaled_dot_product_attention(q.view(N, self.heads, 1, -1), k, v, attn_mask=mask)
        return y.reshape(N, -1)


class MLP(nn.Module):
    """Two linear layers with a GELU between, four times wider inside; [N, L, width] -> [N, L, width]."""

    def __init__(self, width: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = LinearGELU(width, 4 * width, quick=quick_gelu)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class ResidualAttentionBlock(nn.Module):
    """Attention, then a perceptron, each normed before, dropped out after, and added back; `at` and `packing` as in
    `Attention`.

    `scaled_for` layers, if given, the matrices start as in CLIP's text tower (Radford et al. 2021, section 2.5 and its
    released code): normal, attention input width ** -0.5, perceptron input (2 width) ** -0.5, and both that write to
    the residual stream width ** -0.5 (2 layers) ** -0.5.
    """

    def __init__(
        self, width: int, heads: int, *, causal: bool, quick_gelu: bool, dropout: float, scaled_for: int = 0
    ) -> None:
        super().__init__()
        self.width, self.scaled_for = width, scaled_for
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal=causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, quick_gelu=quick_gelu)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values, after those of the parts."""
        if self.scaled_for:
            to_residual = self.width**-0.5 * (2 * self.scaled_for) ** -0.5
            nn.init.normal_(self.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(self.attn.out_proj.weight, std=to_residual)
            nn.init.normal_(self.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(self.mlp.c_proj.weight, std=to_residual)

    def forward(self, x: Tensor, at: At = None, packing: Packing | None = None) -> Tensor:
        x = tokens_at(x, at, packing) + self.dropout(self.attn(self.ln_1(x), at, packing))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of `layers` residual attention blocks, [N, L, width] -> [N, L, width]; `at` and `packing` as in
    `Attention`.

    For one token the last block computes nothing for the others but their keys and values, a sixth of its products.
    `scaled` gives the blocks the initial values of CLIP's text tower. With `grad_checkpointing` set, only the blocks'
    inputs are kept for the backward pass and each block is run again there, with the same dropout.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        causal: bool = False,
        quick_gelu: bool = False,
        dropout: float = 0.0,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        options: dict[str, Any] = {"causal": causal, "quick_gelu": quick_gelu, "dropout": dropout}
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, **options, scaled_for=layers if scaled else 0) for _ in range(layers)
        )

    def forward(self, x: Tensor, at: At = None, packing: Packing | None = None) -> Tensor:
        last = len(self.resblocks) - 1
        for number, block in enumerate(self.resblocks):
            where = at if number == last else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, where, packing, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, where, packing)
        return x
