"""Which layers of compiled towers use Triton kernels of our own: where a compiler leaves passes over memory that a GPU
waits for.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from neuclip_scale.models.transformer import FUSED_DTYPES, Attention, LinearGELU, Transformer
from neuclip_scale.similarity.choosing import Kernels, choose_for

GELU = Kernels("GELU of compiled towers in {}", "neuclip_scale.models.triton_gelu_check")
ATTENTION = Kernels("attention of compiled towers in {}", "neuclip_scale.models.triton_attention_check")


def fuse(model: nn.Module, device: torch.device) -> None:
    """Let the model's layers use their kernels on `device`, those that pass their check there.

    For compiled models: others wait for the host, which an operator of our own costs more of.
    """
    towers = [part for part in model.modules() if isinstance(part, Transformer)]
    for layer in (layer for tower in towers for layer in tower.modules()):
        if isinstance(layer, LinearGELU):
            layer.fused = _chosen(GELU, device, layer.out_features, "triton_gelu")
        elif isinstance(layer, Attention):
            head = layer.out_proj.in_features // layer.heads
            layer.fused = head == Attention.FUSED_HEAD and _chosen(ATTENTION, device, head, "triton_attention")


def _chosen(kernels: Kernels, device: torch.device, dim: int, module: str) -> bool:
    if any(choose_for(kernels, device, dtype, dim).name != "triton" for dtype in FUSED_DTYPES):
        return False
    importlib.import_module(f"neuclip_scale.models.{module}")  # registers the operator
    return True
