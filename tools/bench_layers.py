"""The towers' layers that have kernels of their own, on one GPU, beside torch's: `python tools/bench.py layers`.

GELU with its bias, and attention with its joint projection's bias, forward and backward apart. `torch` is what a
compiled tower does without the kernels: the bias is in the product before, its gradient is a pass of its own, and so is
putting the gradients of queries, keys and values together. By turns in one process; a first call of each, which
compiles, does not count. Most is bound by memory: the bound is what must be read and written, at the speed of a copy
measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import bench_turns
from bench_device import NO_GPU, Runs, against_bound, copy_speed, in_turns, is_missing, name_of


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A block's GELU and attention on a GPU: time beside the time that memory takes."""

    batch_size: int = 512
    """Sequences."""
    num_tokens: int = 197
    """Of each: a picture's of ViT-B/16."""
    num_heads: int = 12
    """Of 64 numbers each."""
    causal: bool = False
    """Whether no token sees those behind it, as in captions (77 tokens, 8 heads)."""
    calls: int = 10
    """Calls of one measurement, one after the other: with one alone a GPU waits for the host."""
    repeats: int = 7
    """Measurements of each contender."""
    contenders: tuple[str, ...] = ("torch", "triton")
    """Who computes."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda; cpu, with TRITON_INTERPRET=1, only shows that this benchmark works."""
    json: str = ""
    """Write every measurement to this file."""


Work = dict[str, Callable[[], object]]
HEAD = 64


def check(options: Layers) -> None:
    """Raise SystemExit for what is no contender."""
    bench_turns.refuse_unknown("contenders", options.contenders, ("torch", "triton"))


def measure(options: Layers) -> dict[str, Any]:
    """All layers and contenders by turns; returns what --json holds. Without a GPU it says so and measures nothing."""
    import torch

    if is_missing(options.device):
        return {"rows": [], "needs": NO_GPU}
    runs: Runs = {}
    rows = []
    for layer, prepare, numbers in (
        ("GELU", _gelu, (8, 12)),  # of the width, read and written
        ("attention", _attention, (4, 8)),
    ):
        work: Work = {}
        for contender in options.contenders:
            for direction, call in prepare(contender, options).items():
                work[f"{layer} {direction}, {contender}"] = partial(_several, call, options.calls)
        measured = _of_one(in_turns(work, options.repeats, options.device), options.calls)
        runs |= measured
        speed = copy_speed(options.device)
        elements = options.batch_size * options.num_tokens * options.num_heads * HEAD
        for name in measured:
            bound = numbers["backward" in name] * elements * 2 / speed * 1e3
            added = max(run["added_mib"] for run in measured[name])
            rows.append({"contender": name, "added_mib": added, **against_bound(measured[name], bound)})
    return {"device": name_of(options.device), "torch": torch.__version__, "rows": rows, "runs": runs}


def _several(call: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        call()


def _of_one(runs: Runs, calls: int) -> Runs:
    return {name: [{**run, "milliseconds": run["milliseconds"] / calls} for run in each] for name, each in runs.items()}


def _gelu(contender: str, options: Layers) -> Work:
    """Forward: gelu(x + bias). Backward: the gradients of both."""
    import torch
    import torch.nn.functional as F

    width = 4 * options.num_heads * HEAD
    x, slopes = torch.randn(
        2, options.batch_size * options.num_tokens, width, device=options.device, dtype=torch.bfloat16
    ).unbind()
    bias = torch.randn(width, device=options.device)
    if contender == "triton":
        from neuclip_scale.models.triton_gelu import bias_gelu, bias_gelu_backward

        return {
            "forward": lambda: bias_gelu(x, bias, False),
            "backward": lambda: bias_gelu_backward(slopes, x, bias, False),
        }

    def backward(slopes: Any, x: Any) -> Any:
        gradient = torch.ops.aten.gelu_backward(slopes, x)
        return gradient, gradient.sum(0)

    forward, both = _compiled(F.gelu, options), _compiled(backward, options)
    return {"forward": lambda: forward(x), "backward": lambda: both(slopes, x)}


def _attention(contender: str, options: Layers) -> Work:
    """Forward: [N, L, 3 width] -> [N, L, width]. Backward: the gradients of that and of its bias."""
    import torch

    from neuclip_scale.models.triton_attention_check import reference

    width, heads = options.num_heads * HEAD, options.num_heads
    shape = (options.batch_size, options.num_tokens)
    qkv = torch.randn(*shape, 3 * width, device=options.device, dtype=torch.bfloat16, requires_grad=True)
    slopes = torch.randn(*shape, width, device=options.device, dtype=torch.bfloat16)
    if contender == "triton":
        from neuclip_scale.models.triton_attention import attention, attention_backward

        given, bias = qkv.detach(), torch.zeros(3 * width, device=options.device)
        out, levels = attention(given, bias, heads, options.causal)
        return {
            "forward": lambda: attention(given, bias, heads, options.causal),
            "backward": lambda: attention_backward(slopes, out, levels, given, heads, options.causal),
        }
    forward = _compiled(lambda qkv: reference(qkv, heads, options.causal), options)
    add_up = _compiled(lambda gradient: gradient.sum((0, 1)), options)
    out = forward(qkv)
    return {
        "forward": lambda: forward(qkv),
        "backward": lambda: add_up(torch.autograd.grad(out, qkv, slopes, retain_graph=True)[0]),
    }


def _compiled(function: Callable[..., Any], options: Layers) -> Callable[..., Any]:
    import torch

    return torch.compile(function) if options.device == "cuda" else function


def show(options: Layers, result: dict[str, Any]) -> None:
    """Print the comparison."""
    if "needs" in result:
        print(f"layers: needs {result['needs']}")
        return
    print(
        f"{options.batch_size} sequences of {options.num_tokens} tokens{', causal' * options.causal}, "
        f"{options.num_heads} heads of {HEAD}, bf16, "
        f"{result['device']}; bound: memory at a copy's speed"
    )
    for row in result["rows"]:
        low, high = row["milliseconds_range"]
        print(
            f"  {row['contender']:<30}{row['milliseconds']:>9.3f} ms{f'{low:.3f} to {high:.3f}':>18}"
            f"{row['bound_milliseconds']:>9.3f} ms{row['share_of_bound']:>6.0%}{row['added_mib']:>9.0f} MiB added"
        )
