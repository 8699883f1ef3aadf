"""A step's sums over neuclip-queue's queue on one GPU, of embeddings and of pairs mapped anew, torch beside Triton:
part of `bench.py npn --device cuda`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench_device import NO_GPU, computed_by, in_turns, is_missing, timed
from bench_npn_gpu import against, bound_cells, peak_tflops, products_bound

if TYPE_CHECKING:
    from bench_npn import Npn

KINDS = {"kept": "of embeddings", "anew": "mapped anew"}

BLOCKS = (
    (128, 128, 64, 8, 3, 128),
    (128, 128, 64, 8, 3, None),
    (128, 128, 32, 8, 4, 128),
    (128, 256, 64, 8, 3, None),
    (128, 64, 64, 4, 3, 168),
    (64, 128, 64, 4, 3, 168),
)
"""Those that run are among them: anchors, entries, depth in 2-byte elements, warps, stages, most registers."""


def measure(options: Npn, device: Any) -> dict[str, Any]:
    """One call of `sums` for each contender and kind of queue, by turns; with `options.kernels` Triton's with several
    blocks too.
    """
    if is_missing(device):
        return {"needs": NO_GPU}
    pairs = 2.0 * options.batch_size * options.queue_size
    width = sum(options.projected_widths)
    # Of a queue mapped anew all anchors go through the maps first.
    flops = {
        "kept": pairs * 2 * options.embed_dim,
        "anew": pairs * width + 2.0 * options.batch_size * options.embed_dim * width,
    }
    peak, result, work = peak_tflops(options, device), dict[str, Any](), {}
    for kind in KINDS:
        work[kind], result["num_horizons"] = _sums(options, device, anew=kind == "anew")
        runs = in_turns(dict.fromkeys(options.contenders, work[kind]), options.repeats, device, computed_by)
        rows = [_row(name, runs[name], products_bound(name, flops[kind], peak)) for name in options.contenders]
        result[kind] = {"tflop": flops[kind] / 1e12, "rows": rows, "runs": runs}
    blocks = _with_blocks(options, work["kept"], flops["kept"], device) if options.kernels else []
    return {**result, "blocks": blocks}


def _sums(options: Npn, device: Any, *, anew: bool) -> tuple[Callable[[], object], int]:
    """What to time, `sums`, and for how many horizons: a full queue, and a batch of which it has seen some pairs."""
    import torch
    from torch.nn.functional import normalize

    from neuclip_scale.config import ObjectiveConfig
    from neuclip_scale.normalizers import EmbeddingQueue, ProjectingQueue, horizons_up_to
    from neuclip_scale.projection import Projection
    from neuclip_scale.similarity import PairFeatures

    generator = torch.Generator(device).manual_seed(0)
    maps = [
        torch.randn(width, options.embed_dim, device=device, generator=generator) / width**0.5
        for width in options.projected_widths
    ]

    def pairs(count: int) -> PairFeatures:
        inputs = [torch.randn(count, len(each), device=device, generator=generator) for each in maps]
        image, text = (normalize(x @ each, dim=1) for x, each in zip(inputs, maps, strict=True))
        first, second = (Projection(x, each) for x, each in zip(inputs, maps, strict=True))
        return replace(PairFeatures.single(image, text), projections=(first, second))

    size = options.queue_size
    queue = (
        ProjectingQueue(options.projected_widths, size, rank=0, world_size=1)
        if anew
        else EmbeddingQueue(options.embed_dim, size, rank=0, world_size=1)
    ).to(device)
    queue.push(pairs(size), torch.arange(size, device=device))
    batch, index = pairs(options.batch_size), 2 * torch.arange(options.batch_size, device=device)
    scale, horizons = torch.full((1,), 1 / 0.07, device=device), horizons_up_to(size, options.batch_size).to(device)
    tile_size = ObjectiveConfig().tile_size
    return partial(queue.sums, batch, scale, index, horizons, tile_size=tile_size), len(horizons)


def _row(name: str, runs: list[dict[str, float]], bound: float | None) -> dict[str, Any]:
    times = [run["milliseconds"] for run in runs]
    median = statistics.median(times)
    return {
        "contender": name,
        "ms": median,
        "ms_range": [min(times), max(times)],
        "added_mib": max(run["added_mib"] for run in runs),
        **against(bound, median),
    }


def _with_blocks(options: Npn, work: Callable[[], object], flops: float, device: Any) -> list[dict[str, Any]]:
    """Milliseconds of `sums` with other blocks of `strip_kernel`."""
    from neuclip_scale.normalizers import triton_queue
    from neuclip_scale.similarity.triton_blocks import Blocks

    rows, kept = [], triton_queue.STRIP
    for name in (each for each in options.contenders if each.startswith("triton")):
        for blocks in map(Blocks._make, BLOCKS):
            row: dict[str, Any] = {"contender": name, "blocks": str(tuple(blocks))}
            triton_queue.STRIP = blocks
            try:
                with computed_by(name):
                    timed(work, device)
                    row["ms"] = min(timed(work, device)["milliseconds"] for _ in range(options.repeats))
                row["tflops"] = flops / row["ms"] / 1e9
            except Exception as error:  # blocks that do not fit are an answer too
                row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            finally:
                triton_queue.STRIP = kept
            rows.append(row)
    return rows


def show(options: Npn, result: dict[str, Any]) -> None:
    """Print what was measured."""
    if "needs" in result:
        print(f"\nqueue on a GPU: needs {result['needs']}")
        return
    print(f"\nqueue of {options.queue_size} pairs, {result['num_horizons']} horizons, both sides; bound as the NPN's")
    for kind, what in KINDS.items():
        print(f"  {what:<16}{'sums':>11}{'range':>18}{'bound':>11}{'of it':>7}{'MiB':>6}")
        for row in result[kind]["rows"]:
            low, high = row["ms_range"]
            print(
                f"  {row['contender']:<16}{row['ms']:>8.2f} ms{f'{low:.2f} to {high:.2f}':>18}"
                f"{bound_cells(row)}{row['added_mib']:>6.0f}"
            )
    for row in result["blocks"]:
        speed = f"{row['ms']:>8.2f} ms{row['tflops']:>6.0f} TFLOP/s" if "ms" in row else row["failure"]
        print(f"  strip     {row['contender']:<16}{row['blocks']:<32}{speed}")
