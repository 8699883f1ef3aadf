"""A training step on a GPU beside open_clip's own trainer: `python tools/bench.py step --device cuda`.

All contenders live in one process and run by turns on batches that wait in the GPU's memory, each with its own
precision of fp32 products, which torch keeps for the whole process. Times are those of CUDA events. `added_mib` is the
most that a step adds to weights, optimizer state and batch, gradients among it, by torch's allocator; `whole_mib` is
that and what the contender holds between steps, where the memory of CUDA graphs is counted too. Clock and power
say whether the card's power limit, not its arithmetic, was the bound. On a CPU, which `measure` takes too, it only
shows that this works.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_step
from bench_device import MEBIBYTE, NO_GPU, Runs, clock_and_power, is_missing, name_of, timed

COMPILED = ", compiled"
"""Ends the names of contenders whose towers torch.compile has compiled."""


@dataclass(frozen=True)
class _Started:
    """A contender after its first steps."""

    steps: Iterator[Any]
    parameters: Sequence[Any]
    matmul_precision: str
    """How it has torch multiply fp32 numbers."""
    held_mib: float
    """What it keeps of the GPU between steps: reserved, as a graph's memory is, which nothing else may take."""


def measure(options: Any) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds. Without a GPU it says so and measures nothing."""
    import torch

    if is_missing(options.device):
        return {"rows": [], "needs": NO_GPU}
    torch.backends.cudnn.benchmark = True
    runs: Runs = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        started: dict[str, _Started] = {}
        for number, name in enumerate(options.contenders):
            try:
                started[name] = _start(name, options, Path(folder) / str(number))
            except torch.cuda.OutOfMemoryError as error:
                failures[name] = _too_large(error)
        kinds = {name: (each.matmul_precision, each.held_mib) for name, each in started.items()}
        for _ in range(options.repeats):
            for name in list(started):
                try:
                    runs.setdefault(name, []).append(_timed(started[name], options))
                except torch.cuda.OutOfMemoryError as error:
                    failures[name] = _too_large(error)
                    del started[name], runs[name]  # the others' rounds go on, with its memory
    flops = {"mfu": useful_flops(options), "mfu_all_tokens": _all_flops(options)}
    return {
        "device": name_of(options.device),
        "torch": torch.__version__,
        "flops_per_step": flops["mfu"],
        "flops_per_step_all_tokens": flops["mfu_all_tokens"],
        "rows": [_row(name, runs, options, flops, *kinds[name]) for name in runs],
        "runs": runs,
        "failures": failures,
    }


def _too_large(error: BaseException) -> str:
    return f"out of memory: {str(error).splitlines()[0]}"


def _start(name: str, options: Any, folder: Path) -> _Started:
    """A contender after two steps, which compile, take memory and record graphs."""
    import torch

    _forget()
    before = _reserved()
    torch.set_float32_matmul_precision("high")  # as open_clip's main sets it; our trainer sets its own
    torch.manual_seed(0)
    plain = name.removesuffix(COMPILED)
    compiled = plain != name
    parts = options.micro_batches if plain in bench_step.SPLIT else 1
    if plain in (bench_step.PEER, bench_step.PEER_PARTS):
        steps = bench_step.open_clip_steps(options, parts, compiled=compiled)
    else:
        steps = bench_step.our_steps(options, parts, plain, folder, compiled=compiled)
    next(steps)
    parameters = next(steps)
    bench_step.free_gradients(parameters)
    _forget()
    held = (_reserved() - before) / MEBIBYTE
    return _Started(steps, parameters, torch.get_float32_matmul_precision(), held)


def _timed(started: _Started, options: Any) -> dict[str, float]:
    """Seconds of a step and what it added to the GPU's memory."""
    import torch

    bench_step.free_gradients(started.parameters)
    _forget()
    torch.set_float32_matmul_precision(started.matmul_precision)
    with clock_and_power(options.device) as seen:
        run = timed(lambda: next(started.steps), options.device)
    return {"seconds": run["milliseconds"] / 1e3 / options.steps, "added_mib": run["added_mib"], **seen}


def _forget() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reserved() -> int:
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def useful_flops(options: Any) -> int:
    """Of a step, forward and backward, nothing twice, captions up to their ends."""
    from neuclip_scale.data.batch import caption_lengths
    from neuclip_scale.telemetry.flops import CaptionTokens, count_encoder_flops

    model, size = _our_model(options), options.batch_size
    lengths = caption_lengths(bench_step.noise(size, 1, model.context_length, options.caption_tokens)[1])
    captions = CaptionTokens(sum(lengths) / size, sum(length**2 for length in lengths) / size)
    return count_encoder_flops(model).at(captions).training * size


def _all_flops(options: Any) -> int:
    """Of the same step as open_clip's towers take it: every block computes every token, padding among them."""
    from neuclip_scale.telemetry.flops import every_token_flops

    return every_token_flops(_our_model(options)) * int(options.batch_size)


def _our_model(options: Any) -> Any:
    from neuclip_scale.models.building import create_model
    from neuclip_scale.models.presets import get_preset

    return create_model(get_preset(options.preset))


def _row(
    name: str, runs: Runs, options: Any, flops: dict[str, int], matmul_precision: str, held_mib: float
) -> dict[str, Any]:
    from neuclip_scale.telemetry.devices import peak_flops

    each = runs[name]
    seconds = [run["seconds"] for run in each]
    median = statistics.median(seconds)
    row: dict[str, Any] = {
        "contender": name,
        "seconds": median,
        "seconds_range": [min(seconds), max(seconds)],
        "samples_per_second": options.batch_size / median,
        "added_mib": max(run["added_mib"] for run in each),
        "whole_mib": held_mib + max(run["added_mib"] for run in each),
        "matmul_precision": matmul_precision,
    }
    for measured in ("sm_mhz", "watts"):
        if all(measured in run for run in each):
            row[measured] = statistics.median(run[measured] for run in each)
    uses_tf32 = options.precision == "fp32" and matmul_precision != "highest"
    if peak := peak_flops(name_of(options.device), "tf32" if uses_tf32 else options.precision):
        row |= {kind: count / median / peak for kind, count in flops.items()} | {"bound_seconds": flops["mfu"] / peak}
    plain = name.removesuffix(COMPILED)
    peer = bench_step.PEERS[plain] + name[len(plain) :]
    if peer in runs:
        ratios = [other["seconds"] / run["seconds"] for run, other in zip(each, runs[peer], strict=True)]
        row |= {"peer": peer, "speed_ratio": statistics.median(ratios), "speed_ratio_range": [min(ratios), max(ratios)]}
    return row


def show(options: Any, result: dict[str, Any]) -> None:
    """Print the comparison."""
    if "needs" in result:
        print(f"step: needs {result['needs']}")
        return
    print(
        f"{options.preset}, B = {options.batch_size}, whole or in {options.micro_batches} parts, {options.precision}, "
        f"{result['device']}, {result['flops_per_step'] / 1e12:.1f} TFLOPs a step"
    )
    print(
        f"{'':<48}{'time':>11}{'range':>22}{'pairs/s':>10}{'of peer':>9}"
        f"{'MFU':>7}{'all tokens':>12}{'MHz':>6}{'watts':>7}{'added MiB':>11}{'in all':>9}"
    )
    for row in result["rows"]:
        low, high = row["seconds_range"]
        ratio = row.get("speed_ratio")
        mfu, all_tokens = (f"{row[kind]:.1%}" if kind in row else "-" for kind in ("mfu", "mfu_all_tokens"))
        mhz, watts = (f"{row[kind]:.0f}" if kind in row else "-" for kind in ("sm_mhz", "watts"))
        print(
            f"{row['contender']:<48}{row['seconds'] * 1e3:>8.1f} ms{f'{low * 1e3:.1f} to {high * 1e3:.1f} ms':>22}"
            f"{row['samples_per_second']:>10.0f}{'-' if ratio is None else f'{ratio:.2f}':>9}"
            f"{mfu:>7}{all_tokens:>12}{mhz:>6}{watts:>7}{row['added_mib']:>11.0f}{row['whole_mib']:>9.0f}"
        )
    for name, why in result["failures"].items():
        print(f"{name:<48}{why}")
