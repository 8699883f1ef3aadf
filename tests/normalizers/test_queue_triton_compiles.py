"""The queue's kernels compile for Hopper, which takes no GPU, with the blocks that run there."""

from __future__ import annotations

import importlib.util
import os

import pytest
from hopper import SHARED_MEMORY, compile_for_hopper, launch_options, stack_bytes

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]
SPILLED = {16: 64, 32: 160}
"""Bytes of a thread that may leave the registers, by columns of the weights: what stays the same from block to block of
entries, read again once for each. Triton 3.8 has 32 with 16 columns, 120 with 32."""


@pytest.mark.parametrize(("columns", "even"), [(16, True), (32, True), (16, False)])
@pytest.mark.parametrize(("operands", "precision"), [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3")])
def test_both_products_run_on_tensor_cores_and_load_asynchronously(
    operands: str, precision: str, columns: int, even: bool
) -> None:
    from neuclip_scale.normalizers import triton_queue, triton_queue_kernels

    options = triton_queue.strip_options(2 if operands == "bf16" else 4, precision)
    launched = launch_options(options)
    kinds = {"anchors": f"*{operands}", "negatives": f"*{operands}", "table": "*bf16"}
    kinds |= dict.fromkeys(("anchor_codes", "entry_codes"), "*i32")
    constants = {**options, "EVEN": even, "PRECISION": precision, "COLUMNS": columns, "RESTS": operands == "fp32"}
    compiled = compile_for_hopper(triton_queue_kernels.strip_kernel, kinds, constants, launched)
    assembly = compiled.asm["ptx"]
    similarities = "bf16.bf16" if operands == "bf16" else "tf32.tf32"
    assert f"wgmma.mma_async.sync.aligned.m64n{options['BLOCK_N']}k" in assembly
    assert f"f32.{similarities}" in assembly
    # Exponentials times weights, eight times 16 entries, and for fp32 what bf16 leaves of them.
    assert assembly.count(f"m64n{columns}k16.f32.bf16.bf16") >= (8 if operands == "bf16" else 16)
    assert assembly.count("cp.async.cg.shared.global") >= 24
    assert compiled.metadata.shared <= (SHARED_MEMORY if precision == "tf32x3" else SHARED_MEMORY // 2)
    assert stack_bytes(compiled) <= SPILLED[columns]


@pytest.mark.parametrize("places", [8, 16])
def test_joining_stays_in_registers(places: int) -> None:
    from neuclip_scale.normalizers import triton_queue, triton_queue_kernels

    constants = {"PLACES": places, "ANCHORS": triton_queue._JOINED}
    options = {"num_warps": 4, "num_stages": 3}
    assert stack_bytes(compile_for_hopper(triton_queue_kernels.join_kernel, {}, constants, options)) == 0
