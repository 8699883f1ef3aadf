"""Compiles Triton kernels for a Hopper GPU, which takes none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SHARED_MEMORY = 227 * 1024
"""Bytes that a program can have."""


def compile_for_hopper(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> Any:
    """`kinds` of the arguments that are neither sizes nor fp32 tensors; sizes and addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(place,)] = "constexpr", constants[argument]
            continue
        size = argument == "d" or argument.startswith(("num_", "split_", "strip_")) or argument.endswith("_stride")
        signature[argument] = kinds.get(argument, "i32" if size else "*fp32")
        if signature[argument] != "fp32":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def launch_options(options: dict[str, Any]) -> dict[str, int]:
    """Take out what is no argument of a kernel."""
    names = [name for name in ("num_warps", "num_stages", "maxnreg") if name in options]
    return {name: options.pop(name) for name in names}


def stack_bytes(compiled: Any) -> int:
    """Local memory of a thread in the machine code: arrays, and registers that were spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout)))
