"""The NPN's Triton kernels one by one, with several blocks: `python tools/bench.py npn --device cuda --kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench_npn import Npn

_EITHER = (128, 128, 64, 8, 3, 128), (128, 128, 64, 8, 4, None), (128, 128, 64, 8, 3, None), (64, 128, 64, 4, 4, 128)
BLOCKS = {
    "weigh": (*_EITHER, (128, 256, 64, 8, 3, None)),
    "pull": (*_EITHER, (128, 64, 64, 4, 4, 128), (128, 128, 32, 8, 5, 128)),
}
"""Those that run are among them: rows, columns, depth in 2-byte elements, warps, stages, most registers of a thread."""
REPEATS = 20


def measure(options: Npn, device: Any) -> list[dict[str, Any]]:
    """Microseconds of each kernel, blocks and precision, the mean of several calls in a row."""
    import torch

    rows, before = [], torch.get_float32_matmul_precision()
    for precision in dict.fromkeys(name.split()[1] for name in options.contenders if name.startswith("triton")):
        torch.set_float32_matmul_precision(precision)
        for kernel, blocks, flops, call in _calls(options, device):
            row = {"kernel": kernel, "precision": precision, "blocks": blocks}
            try:
                seconds = _seconds(call, device)
                row |= {"microseconds": seconds * 1e6, "tflops": flops / seconds / 1e12}
            except Exception as error:  # blocks that do not fit are an answer too
                row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.append(row)
    torch.set_float32_matmul_precision(before)
    return rows


def _calls(options: Npn, device: Any) -> Iterator[tuple[str, str, float, Callable[[], None]]]:
    """Kernel, blocks, FLOPs and what to time."""
    import torch
    from torch.nn.functional import normalize

    from neuclip_scale.normalizers import NormalizerPredictionNetwork, triton_npn
    from neuclip_scale.similarity.triton_blocks import Blocks

    b, m, d = options.batch_size, options.num_prototypes, options.embed_dim
    npn = NormalizerPredictionNetwork(d, m).to(device)
    npn.squares.fill_(1.0)
    anchors, some = normalize(torch.randn(b, d, device=device), dim=1), torch.zeros(b, device=device)
    batch = triton_npn.FusedBatch(npn, anchors, some, 0.07, torch.arange(b, device=device))
    weights, total, rows = (
        batch.anchors.new_empty(m, batch.height),
        torch.empty_like(npn.weight),
        slice(0, batch.height),
    )
    flops = 2.0 * batch.height * m * d
    kept = triton_npn.WEIGH, triton_npn.PULL, triton_npn.FACTOR_BLOCK
    for blocks in map(Blocks._make, BLOCKS["weigh"]):
        triton_npn.WEIGH, triton_npn.FACTOR_BLOCK = blocks, blocks.n
        yield "weigh", str(tuple(blocks)), flops, lambda: batch._weigh(rows, weights)
        triton_npn.WEIGH, triton_npn.FACTOR_BLOCK = kept[0], kept[2]
    batch._weigh(rows, weights)
    yield "factors", "", 0.0, lambda: batch._factors(rows, None, some[rows], 1 / b)
    batch.largest.fill_(1e-3)
    for blocks in map(Blocks._make, BLOCKS["pull"]):
        triton_npn.PULL = blocks
        yield "pull", str(tuple(blocks)), flops, lambda: batch._pull(rows, weights, total)
        triton_npn.PULL = kept[1]
    total.fill_(1e-3)
    yield "adagrad", "", 0.0, lambda: batch.descend(total, 1e-6, 1e-10)


def _seconds(call: Callable[[], None], device: Any) -> float:
    import torch

    call()
    if device.type != "cuda":
        return 1.0
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # the host queues all calls meanwhile, so that only the GPU counts
    first.record()
    for _ in range(REPEATS):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / REPEATS / 1e3
