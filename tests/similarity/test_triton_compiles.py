"""The kernels compile for Hopper, which takes no GPU: the forms that run there, with the blocks that run there."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]
SHARED_MEMORY = 227 * 1024
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "log-sum-exps, both directions": ("sums_kernel", {"EXCLUDE": True, "COLUMNS": True, "INDIVIDUAL": False}),
    "log-sum-exps and means": ("sums_kernel", {"EXCLUDE": True, "COLUMNS": False, "INDIVIDUAL": True}),
    "exponentials": ("exponentials_kernel", {"INDIVIDUAL": False}),
    "sigmoids": ("sigmoids_kernel", {}),
    "product": ("product_kernel", {"TRANSPOSED": False, "ADD": True}),
    "transposed product": ("product_kernel", {"TRANSPOSED": True, "ADD": True}),
}
FEATURES = ("left", "right", "weights", "features")
SIZES = ("num_rows", "num_columns", "depth", "d", "split_depth", "diagonal", "out_stride", "split_stride")


def compile_for_hopper(name: str, flags: dict[str, Any], dtype: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from neuclip_scale.similarity import triton_blocks, triton_kernels

    kernel = getattr(triton_kernels, name)
    blocks = triton_blocks.UNTUNED
    values = {
        **flags, **blocks.sizes(2 if dtype == "bf16" else 4), "EVEN": True, "UPCAST": False, "GROUP": 8,
        "SLOT": triton_blocks.SLOT, "PRECISION": "ieee" if dtype == "bf16" else "tf32x3",
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument], constants[(place,)] = "constexpr", values[argument]
            continue
        is_size = argument in SIZES or argument.endswith("_stride")
        signature[argument] = "i32" if is_size else f"*{dtype}" if argument in FEATURES else "*fp32"
        if argument != "diagonal":  # sizes of whole chunks and addresses of tensors
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    ("form", "dtype"), [*((form, "bf16") for form in FORMS), ("exponentials", "fp32"), ("product", "fp32")]
)
def test_compiles_to_tensor_cores_and_asynchronous_copies(form: str, dtype: str) -> None:
    compiled = compile_for_hopper(*FORMS[form], dtype)
    assembly = compiled.asm["ptx"]
    assert "wgmma.mma_async" in assembly
    # Both operands come in 16-byte pieces; one that cannot would be loaded element by element, in the loop's way.
    assert assembly.count("cp.async.cg.shared.global") >= (24 if dtype == "bf16" else 12)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert ".local" not in assembly


def test_nothing_is_tuned_for_small_chunks_or_where_torch_must_be_deterministic() -> None:
    import torch

    from neuclip_scale.similarity.triton_blocks import tunes

    assert tunes(4096)
    assert not tunes(300)
    torch.use_deterministic_algorithms(True)
    try:
        assert not tunes(4096)
    finally:
        torch.use_deterministic_algorithms(False)


def test_blocks_can_be_tuned_by_what_the_kernels_are_called_with() -> None:
    from neuclip_scale.similarity import triton_blocks

    for name, by in triton_blocks._TUNED_BY.items():
        for item_size in (2, 4):
            tuner = triton_blocks.tuned(name, item_size)
            assert set(by) <= set(tuner.arg_names)
            assert len(tuner.configs) == len(triton_blocks.candidates(name, item_size)) > 1
            for config in tuner.configs:
                if "SLOT" in tuner.arg_names:
                    assert config.kwargs["BLOCK_M"] % triton_blocks.SLOT == 0
                    assert config.kwargs["BLOCK_N"] % triton_blocks.SLOT == 0
                assert max(config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]) <= triton_blocks.LARGEST
                assert triton_blocks.EVEN_BLOCK % config.kwargs["BLOCK_K"] == 0
                stage = (config.kwargs["BLOCK_M"] + config.kwargs["BLOCK_N"]) * config.kwargs["BLOCK_K"] * item_size
                assert stage * config.num_stages <= SHARED_MEMORY
