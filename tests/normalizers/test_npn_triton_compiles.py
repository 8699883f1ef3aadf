"""The NPN's kernels compile for Hopper, which takes no GPU, with the blocks that run there."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from hopper import SHARED_MEMORY, compile_for_hopper, launch_options, stack_bytes

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]
SPILLED = 64
"""Bytes of a thread that may leave the registers: a few addresses and masks after the loop, but no operand. Which do
depends on Triton's version: none with 3.8, 40 bytes in one form with 3.6."""
KINDS = dict.fromkeys(("learning_rate", "eps", "log_eps", "share"), "fp32")
KINDS |= dict.fromkeys(("sample_index", "prototype_index"), "*i64")


@pytest.mark.parametrize(("operands", "precision"), [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3")])
@pytest.mark.parametrize("kernel", ["weigh_kernel", "pull_kernel"])
def test_products_run_on_tensor_cores_and_load_asynchronously(kernel: str, operands: str, precision: str) -> None:
    from neuclip_scale.normalizers import triton_npn, triton_npn_kernels

    blocks = triton_npn.WEIGH if kernel == "weigh_kernel" else triton_npn.PULL
    options = triton_npn.options_of(blocks, 2 if operands == "bf16" else 4, precision)
    launched = launch_options(options)
    constants = {**options, "EVEN": True, "PRECISION": precision}
    if kernel == "weigh_kernel":
        constants |= {"OWN": True, "STORE": True}
    else:
        # What is innermost in the anchors' memory, whose stride Triton specializes on.
        innermost = "inner_stride" if operands == "bf16" else "anchor_stride"
        constants |= {"ADD": False, "FACTOR_BLOCK": triton_npn.FACTOR_BLOCK, innermost: 1}
    kinds = KINDS | dict.fromkeys(("anchors", "directions", "weights"), f"*{operands}")
    compiled = compile_for_hopper(getattr(triton_npn_kernels, kernel), kinds, constants, launched)
    assembly = compiled.asm["ptx"]
    assert "wgmma.mma_async" in assembly
    # Both operands come in 16-byte pieces.
    assert assembly.count("cp.async.cg.shared.global") >= 24
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert stack_bytes(compiled) <= SPILLED


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("factors_kernel", {"PREDICT": False, "ANCHORS": 32, "BLOCKS": 32}),
        ("factors_kernel", {"PREDICT": True, "ANCHORS": 32, "BLOCKS": 32}),
        ("adagrad_kernel", {"ROWS": 4, "BLOCK": 512}),
        ("adagrad_kernel", {"ROWS": 1, "BLOCK": 2048}),
    ],
)
def test_the_rest_stays_in_registers(kernel: str, constants: dict[str, Any]) -> None:
    from neuclip_scale.normalizers import triton_npn_kernels

    options = {"num_warps": 4, "num_stages": 3}
    compiled = compile_for_hopper(getattr(triton_npn_kernels, kernel), KINDS, constants, options)
    assert stack_bytes(compiled) == 0


def test_blocks_of_prototypes_fit_both_products() -> None:
    from neuclip_scale.normalizers.triton_npn import FACTOR_BLOCK, PULL, WEIGH
    from neuclip_scale.similarity.triton_blocks import EVEN_BLOCK

    assert WEIGH.n == FACTOR_BLOCK
    assert FACTOR_BLOCK % PULL.m == 0
    for blocks in (WEIGH, PULL):
        assert EVEN_BLOCK % blocks.depth == 0
