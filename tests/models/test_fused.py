"""Layers with kernels of our own: where they are chosen, and that they compile for Hopper, which takes no GPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from hopper import SHARED_MEMORY, compile_for_hopper, launch_options, stack_bytes

from neuclip_scale.models import clip, fused
from neuclip_scale.models.building import create_model
from neuclip_scale.models.presets import get_preset
from neuclip_scale.models.transformer import Attention, LinearGELU
from neuclip_scale.similarity.choosing import Choice

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton is not installed, or interprets in this process",
)


def test_nothing_is_fused_where_triton_does_not_run() -> None:
    model = create_model(get_preset("toy"))
    fused.fuse(model, torch.device("cpu"))
    assert not any(getattr(layer, "fused", False) for layer in model.modules())


def test_what_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose_for(kernels: Any, device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
        asked.append((kernels, dim))
        return Choice("triton", "")

    monkeypatch.setattr(fused, "choose_for", choose_for)
    monkeypatch.setattr(fused.importlib, "import_module", lambda name: None)
    model = create_model(get_preset("ViT-B-16"))
    model.set_grad_checkpointing()
    fused.fuse(model, torch.device("cuda"))
    layers = [layer for layer in model.modules() if isinstance(layer, Attention | LinearGELU)]
    assert {layer.fused for layer in layers} == {True}
    assert set(asked) == {(fused.GELU, 3072), (fused.GELU, 2048), (fused.ATTENTION, 64)}


def test_layers_are_fused_once_before_a_compiled_model_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr(clip, "fuse", lambda model, device: calls.append(device))

    class OnGPU(torch.Tensor):
        is_cuda = True

    model = create_model(get_preset("toy"))
    images = torch.randn(2, 3, model.image_size, model.image_size)
    model(images.as_subclass(OnGPU))
    assert not calls, "not compiled"
    model.compile_towers(backend="eager")
    model(images)
    assert not calls, "not on a GPU"
    model(images.as_subclass(OnGPU))
    model(images.as_subclass(OnGPU))
    assert calls == [images.device]


@compiles
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("direction", ["FORWARD", "BACKWARD"])
def test_gelu_stays_in_registers_and_moves_whole_pieces(direction: str, quick: bool) -> None:
    from neuclip_scale.models import triton_gelu, triton_gelu_kernels

    name = "gelu_kernel" if direction == "FORWARD" else "gelu_backward_kernel"
    options = {**getattr(triton_gelu, direction), "QUICK": quick}
    launched = launch_options(options)
    kinds = dict.fromkeys(("x", "out", "dx", "dout"), "*bf16") | {"width": "i32", "chunk_rows": "i32"}
    compiled = compile_for_hopper(getattr(triton_gelu_kernels, name), kinds, options, launched)
    assembly = compiled.asm["ptx"]
    loads = "ld.global.v4" if direction == "FORWARD" else "cp.async.cg.shared.global"
    assert assembly.count(loads) >= 4
    assert assembly.count("st.global.v4") >= 4
    assert stack_bytes(compiled) == 0


@compiles
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["attention_kernel", "attention_queries_kernel", "attention_keys_kernel"])
def test_attention_multiplies_on_tensor_cores_and_stays_in_registers(name: str, causal: bool) -> None:
    from neuclip_scale.models import triton_attention, triton_attention_kernels

    options: dict[str, Any] = dict(triton_attention.OPTIONS[name])
    launched = launch_options(options)
    kinds = dict.fromkeys(("qkv", "dqkv", "out", "dout"), "*bf16") | {"heads": "i32"}
    constants = {"HEAD": triton_attention.HEAD, "BLOCK": triton_attention.BLOCK, "UPCAST": False, "CAUSAL": causal}
    compiled = compile_for_hopper(getattr(triton_attention_kernels, name), kinds, constants | options, launched)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY // 3, "programs that share a multiprocessor"
    assert stack_bytes(compiled) == 0


@compiles
def test_torch_knows_which_kernels_an_operator_launches() -> None:
    """It keeps compiled programs on disk and makes them anew when these change."""
    from torch._library import triton

    from neuclip_scale.models import triton_attention, triton_attention_kernels, triton_gelu, triton_gelu_kernels

    if not hasattr(triton, "get_triton_kernels_for_op"):
        pytest.skip("this torch does not look for them")
    for module, kernels, operators in (
        (triton_gelu, triton_gelu_kernels, ("bias_gelu", "bias_gelu_backward")),
        (triton_attention, triton_attention_kernels, ("attention", "attention_backward")),
    ):
        for operator in operators:
            assert hasattr(module, operator)
            found = triton.get_triton_kernels_for_op(f"neuclip_scale::{operator}")
            assert found
            assert {kernel for kernel in vars(kernels).values() if kernel in found} == set(found)
