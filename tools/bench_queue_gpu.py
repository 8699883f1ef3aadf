"""A step's sums over neuclip-queue's queue on one GPU, torch beside Triton, and its entries mapped anew: part of
`bench.py npn --device cuda`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench_device import NO_GPU, computed_by, copy_speed, in_turns, is_missing, timed
from bench_npn_gpu import against, bound_cells, peak_tflops, products_bound

if TYPE_CHECKING:
    from bench_npn import Npn

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
    """One call of `sums` for each contender, by turns; with `options.kernels` Triton's with several blocks too."""
    if is_missing(device):
        return {"needs": NO_GPU}
    work, mapping, num_horizons, num_mapped = _sums(options, device)
    runs = in_turns(dict.fromkeys(options.contenders, work), options.repeats, device, computed_by)
    mapped = in_turns(dict.fromkeys(options.contenders, mapping), options.repeats, device, computed_by)
    flops = 2 * 2.0 * options.batch_size * options.queue_size * options.embed_dim
    mapping_flops = 2.0 * num_mapped * sum(options.projected_widths) * options.embed_dim
    # An entry's inputs are read and its embeddings written, in fp32 and, for sums in bf16, in bf16 too.
    fp32_bytes = 4 * num_mapped * (sum(options.projected_widths) + 2 * options.embed_dim)
    bf16_bytes = 2 * num_mapped * 2 * options.embed_dim
    peak, speed = peak_tflops(options, device), copy_speed(device)

    def mapping_bound(name: str) -> float:
        moved = fp32_bytes + bf16_bytes * ("medium" in name)
        return max(products_bound(name, mapping_flops, peak) or 0.0, moved / speed * 1e3)

    return {
        "tflop": flops / 1e12,
        "num_horizons": num_horizons,
        "rows": [_row(name, runs[name], products_bound(name, flops, peak)) for name in options.contenders],
        "runs": runs,
        "mapping_tflop": mapping_flops / 1e12,
        "mapping_bytes": fp32_bytes + bf16_bytes,
        "copy_bytes_per_second": speed,
        "mapping": [_row(name, mapped[name], mapping_bound(name)) for name in options.contenders],
        "mapping_runs": mapped,
        "blocks": _with_blocks(options, work, flops, device) if options.kernels else [],
    }


def _sums(options: Npn, device: Any) -> tuple[Callable[[], object], Callable[[], object], int, int]:
    """What to time, `sums` and `refresh`, and for how many horizons and entries: a full queue, and a batch of which it
    has seen some pairs.
    """
    import torch
    from torch.nn.functional import normalize

    from neuclip_scale.config import ObjectiveConfig
    from neuclip_scale.normalizers import ProjectingQueue, horizons_up_to
    from neuclip_scale.projection import Projection
    from neuclip_scale.similarity import PairFeatures

    generator = torch.Generator(device).manual_seed(0)

    def pairs(count: int) -> PairFeatures:
        sides = torch.randn(2, count, options.embed_dim, device=device, generator=generator)
        image, text = (
            Projection(
                torch.randn(count, width, device=device, generator=generator),
                torch.randn(width, options.embed_dim, device=device, generator=generator),
            )
            for width in options.projected_widths
        )
        return replace(PairFeatures.single(*normalize(sides, dim=2)), projections=(image, text))

    size = options.queue_size
    queue = ProjectingQueue(options.embed_dim, size, options.projected_widths, rank=0, world_size=1).to(device)
    queue.push(pairs(size), torch.arange(size, device=device))
    batch, index = pairs(options.batch_size), 2 * torch.arange(options.batch_size, device=device)
    queue.refresh(batch)
    scale, horizons = torch.full((1,), 1 / 0.07, device=device), horizons_up_to(size, options.batch_size).to(device)
    tile_size = ObjectiveConfig().tile_size
    sums = partial(queue.sums, batch, scale, index, horizons, tile_size=tile_size)
    return sums, partial(queue.refresh, batch), len(horizons), queue.num_mapped(options.batch_size)


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
    print(
        f"\nqueue of {options.queue_size} pairs, {result['num_horizons']} horizons, both sides: "
        f"{result['tflop']:.2f} TFLOPs; bound as the NPN's,\nof entries mapped anew what they "
        f"read and write, {result['mapping_bytes'] / 1e9:.2f} GB at a copy's speed, where that is longer"
    )
    for what, rows in (("sums", result["rows"]), ("mapped anew", result["mapping"])):
        print(f"  {'':<16}{what:>11}{'range':>18}{'bound':>11}{'of it':>7}{'MiB':>6}")
        for row in rows:
            low, high = row["ms_range"]
            print(
                f"  {row['contender']:<16}{row['ms']:>8.2f} ms{f'{low:.2f} to {high:.2f}':>18}"
                f"{bound_cells(row)}{row['added_mib']:>6.0f}"
            )
    for row in result["blocks"]:
        speed = f"{row['ms']:>8.2f} ms{row['tflops']:>6.0f} TFLOP/s" if "ms" in row else row["failure"]
        print(f"  strip     {row['contender']:<16}{row['blocks']:<32}{speed}")
