"""The NPN's share of an iteration on one GPU, torch beside Triton: `python tools/bench.py npn --device cuda`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import bench_npn_kernels
from bench_device import NO_GPU, computed_by, in_turns, is_missing, name_of, timed

if TYPE_CHECKING:
    from bench_npn import Npn

PASSES = {"highest": 6, "high": 2, "medium": 1}
"""Time of one fp32 product on tensor cores, in bf16 products: 3xTF32, TF32, operands rounded to bf16."""


GRAPHS = " graphs"
"""Ends the names of contenders whose updates are started as CUDA graphs."""


def measure(options: Npn, encoder_flops: int, device: Any) -> dict[str, Any]:
    """Encoders and optimizer, and the NPN at full size once for each contender, by turns.

    The rest of the objective is left out of the iteration (`bench.py kernels` has it): the share is a bit too large.
    """
    import torch

    if is_missing(device):
        return {"needs": NO_GPU}
    encoders, optimizer = _encoder_steps(options, device)
    rounds = options.batch_size / options.micro_batch_size
    shared = {
        "encoders": rounds * _median(options, encoders, device),
        "optimizer": _median(options, optimizer, device),
    }
    torch.cuda.empty_cache()
    peak = peak_tflops(options, device)
    work = {name: _contender(options, device, graphs=name.endswith(GRAPHS)) for name in options.contenders}
    runs = in_turns(work, options.repeats, device, computed_by, uncounted=2)  # the second call records graphs
    flops = _npn_flops(options)
    return {
        "name": name_of(device),
        "torch": torch.__version__,
        "shared_ms": shared,
        "encoder_tflops": encoder_flops * options.batch_size / shared["encoders"] / 1e9,
        "npn_tflop": flops / 1e12,
        "peak_tflops": peak,
        "rows": [_row(name, runs[name], shared, flops, peak) for name in work],
        "runs": runs,
        "kernels": bench_npn_kernels.measure(options, device) if options.kernels else [],
    }


def peak_tflops(options: Npn, device: Any) -> float | None:
    """Of bf16 products, for the bound: what is given, else of the GPU's data sheet; None where that is not known."""
    from neuclip_scale.telemetry.devices import peak_flops

    known = peak_flops(name_of(device), "bf16")
    return options.peak_tflops or (known and known / 1e12)


def products_bound(name: str, flops: float, peak: float | None) -> float | None:
    """Milliseconds of `flops` at a contender's precision, at a `peak` in bf16 TFLOP/s."""
    return flops * PASSES[name.split()[1]] / peak / 1e9 if peak else None


def against(bound: float | None, milliseconds: float) -> dict[str, float]:
    """A part of a contender's row; empty where no bound is known."""
    return {"bound_ms": bound, "share_of_bound": bound / milliseconds} if bound else {}


def bound_cells(row: Mapping[str, Any]) -> str:
    """The same, printed."""
    return f"{row['bound_ms']:>8.2f} ms{row['share_of_bound']:>7.0%}" if "bound_ms" in row else f"{'-':>11}{'-':>7}"


def _row(
    name: str, runs: list[dict[str, float]], shared: dict[str, float], flops: float, peak: float | None
) -> dict[str, Any]:
    times = [run["milliseconds"] for run in runs]
    npn = statistics.median(times)
    iteration = sum(shared.values()) + npn
    return {
        "contender": name,
        "npn_ms": npn,
        "npn_ms_range": [min(times), max(times)],
        "npn_added_mib": max(run["added_mib"] for run in runs),
        **against(products_bound(name, flops, peak), npn),
        "iteration_ms": iteration,
        "npn_share": npn / iteration,
    }


def _npn_flops(options: Npn) -> float:
    """Products of a step's updates and predictions, both sides."""
    products = 2 * (2 * options.updates_per_step + 1)
    return products * 2.0 * options.batch_size * options.num_prototypes * options.embed_dim


def _encoder_steps(options: Npn, device: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of a micro-batch under bf16 autocast, and AdamW's step."""
    import torch

    from neuclip_scale.config import OptimConfig
    from neuclip_scale.models.building import create_model
    from neuclip_scale.models.presets import get_preset
    from neuclip_scale.optim import create_optimizer

    model = create_model(get_preset(options.preset)).to(device)
    optimizer = create_optimizer(model, OptimConfig())
    pairs = options.micro_batch_size
    images = torch.randn(pairs, 3, model.image_size, model.image_size, device=device)
    tokens = torch.randint(1, 400, (pairs, model.context_length), device=device)

    def encode() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            output = model(images, tokens)
        (output.image_features.sum() + output.text_features.sum()).backward()

    return encode, optimizer.step


def _contender(options: Npn, device: Any, *, graphs: bool) -> Callable[[], None]:
    """A step's updates of both sides and their predictions, as the objective calls them."""
    import torch
    from bench_npn import make_objective
    from torch.nn.functional import normalize

    from neuclip_scale.similarity import PairFeatures

    generator = torch.Generator(device).manual_seed(0)
    size = (options.batch_size, options.embed_dim)
    image = normalize(torch.randn(size, device=device, generator=generator), dim=1)
    noise = torch.randn(size, device=device, generator=generator) / options.embed_dim**0.5
    pairs = PairFeatures.single(image, normalize(image + noise, dim=1))
    objective = make_objective(options).to(device)
    for npn, others in ((objective.image_npn, pairs.text), (objective.text_npn, pairs.image)):
        rows = torch.arange(options.num_prototypes, device=device) % options.batch_size
        npn.restart(others[rows], rows)
        npn.replays.enabled = graphs
    scale, index = torch.full((1,), 1 / 0.07, device=device), torch.arange(options.batch_size, device=device)
    positives, log_g = pairs.positives(), torch.full(size[:1], -6.0, device=device)
    sides = [(objective.image_npn, pairs.image), (objective.text_npn, pairs.text)]
    rate, tile_size = objective.section.learning_rate, objective.tile_size

    def step() -> None:
        updates = [
            npn.updates(
                anchors, positives, 1 / scale, log_g, index,
                num_updates=options.updates_per_step, learning_rate=rate, tile_size=tile_size,
            )
            for npn, anchors in sides
        ]  # fmt: skip
        for _ in itertools.zip_longest(*updates):
            pass
        for npn, anchors in sides:
            npn(anchors, positives, 1 / scale, index, tile_size=tile_size)

    return step


def _median(options: Npn, action: Callable[[], Any], device: Any) -> float:
    timed(action, device)
    return statistics.median(timed(action, device)["milliseconds"] for _ in range(options.repeats))


def show(options: Npn, result: dict[str, Any]) -> None:
    """Print what was measured on a GPU."""
    if "needs" in result:
        print(f"\nNPN on a GPU: needs {result['needs']}")
        return
    shared, peak = result["shared_ms"], result["peak_tflops"]
    bound = "not known of this device, --peak-tflops gives one"
    if peak:
        bound = f"at {peak:g} TFLOP/s in bf16, half of it for TF32 (high), a sixth for 3xTF32 (highest)"
    print(
        f"\nmeasured on {result['name']}: encoders under bf16 autocast, micro-batches of {options.micro_batch_size}, "
        f"{shared['encoders']:.1f} ms ({result['encoder_tflops']:.0f} TFLOP/s), AdamW {shared['optimizer']:.2f} ms\n"
        f"NPN: {2 * options.updates_per_step} updates, 2 predictions, {result['npn_tflop']:.2f} TFLOPs; bound: "
        f"{bound}.\n"
        "iteration: encoders, AdamW and NPN"
    )
    heads = f"{'NPN':>11}{'range':>18}{'bound':>11}{'of it':>7}{'iteration':>12}{'NPN':>7}{'MiB':>6}"
    print(f"  {'':<16}{heads}")
    for row in result["rows"]:
        low, high = row["npn_ms_range"]
        print(
            f"  {row['contender']:<16}{row['npn_ms']:>8.2f} ms{f'{low:.2f} to {high:.2f}':>18}"
            f"{bound_cells(row)}"
            f"{row['iteration_ms']:>9.1f} ms{row['npn_share']:>7.2%}{row['npn_added_mib']:>6.0f}"
        )
    for row in result["kernels"]:
        speed = (
            f"{row['microseconds']:>8.1f} us{row['tflops']:>6.0f} TFLOP/s" if "microseconds" in row else row["failure"]
        )
        print(f"  {row['kernel']:<10}{row['precision']:<9}{row['blocks']:<32}{speed}")
