"""Contrastive losses on one GPU, Triton beside torch and open_clip: `python tools/bench.py kernels`.

Forward and backward of one process's whole batch. `kernels` is the similarities alone, statistics and gradients;
the other contenders are loss modules behind autograd. By turns in one process; the first call of each is not counted,
it compiles and tunes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import bench_turns
from bench_device import MEBIBYTE, NO_GPU, Runs, against_bound, computed_by, is_missing, timed


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """InfoNCE, the margin form and SigLIP on a GPU: time and extra memory."""

    batch_size: int = 65536
    """B, pairs."""
    embed_dim: int = 512
    """d, embedding width."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the features."""
    repeats: int = 7
    """Measurements of each contender."""
    contenders: tuple[str, ...] = ("kernels", "triton", "torch", "open_clip")
    """What to measure of every form."""
    forms: tuple[str, ...] = ("InfoNCE", "margin", "SigLIP")
    """Losses to measure."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda; cpu, with TRITON_INTERPRET=1, only shows that this benchmark works."""
    json: str = ""
    """Write every measurement to this file."""


class Form(NamedTuple):
    """A kind of loss."""

    objective: str
    """Ours that is measured."""
    peer: str
    """open_clip's, or empty."""
    products: int
    """Products of 2 B^2 d FLOPs that cannot be avoided without keeping the B x B matrix."""


FORMS = {
    "InfoNCE": Form("openclip", "ClipLoss", 4),
    "margin": Form("fastclip-v3", "", 4),
    "SigLIP": Form("siglip", "SigLipLoss", 3),
}


def check(options: Kernels) -> None:
    """Raise SystemExit for what is no contender or form, and for a form that open_clip lacks where it is alone."""
    bench_turns.refuse_unknown("contenders", options.contenders, ("kernels", "triton", "torch", "open_clip"))
    bench_turns.refuse_unknown("forms", options.forms, FORMS)
    if set(options.contenders) == {"open_clip"}:
        known = [name for name, form in FORMS.items() if form.peer]
        bench_turns.refuse_unknown("forms", options.forms, known, " in open_clip, the only contender")


def measure(options: Kernels) -> dict[str, Any]:
    """All forms and contenders by turns; returns what --json holds. Without a GPU it says so and measures nothing."""
    import torch

    device = torch.device(options.device)
    if is_missing(device):
        return {"rows": [], "needs": NO_GPU}
    runs: Runs = {}
    failures: dict[str, str] = {}
    work = {f"{form} {name}": step for form in options.forms for name, step in _steps(form, options, device)}
    for repeat in range(options.repeats + 1):
        for name, step in work.items():
            if name in failures:
                continue
            try:
                run = _timed(step, options, device)
            except torch.cuda.OutOfMemoryError as error:
                failures[name] = f"out of memory: {str(error).splitlines()[0]}"
                continue
            if repeat:
                runs.setdefault(name, []).append(run)
    flops = _matmul_flops(options, device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "matmul_tflops": flops / 1e12,
        "rows": [_row(name, runs[name], options, flops) for name in work if name in runs],
        "runs": runs,
        "failures": failures,
    }


def _steps(form: str, options: Kernels, device: Any) -> Iterator[tuple[str, Callable[[Any, Any], None]]]:
    """What is called with features that need gradients."""
    import torch

    objective, peer, _ = FORMS[form]
    index = torch.arange(options.batch_size, device=device)
    scale, bias = torch.tensor(1 / 0.07, device=device), torch.tensor(-10.0, device=device)
    for contender in options.contenders:
        if contender == "kernels":
            yield contender, _kernels(form, scale.reshape(1), bias.reshape(1))
        elif contender in ("torch", "triton"):
            yield contender, _ours(objective, contender, options, scale, bias, index)
        elif peer:
            yield f"open_clip.{peer}", _peer(peer, scale, bias, device)


def _kernels(form: str, scale: Any, bias: Any) -> Callable[[Any, Any], None]:
    def step(image: Any, text: Any) -> None:
        from neuclip_scale.similarity import PairFeatures, pair_gradients, pair_logsumexp, pair_sigmoids

        pairs = PairFeatures.single(image.detach(), text.detach())
        with computed_by("triton"):
            if form == "SigLIP":
                pair_sigmoids(pairs, scale, bias)
                return
            exclude = form == "margin"
            rows = pair_logsumexp(pairs, scale, exclude_diagonal=exclude)
            pair_gradients(pairs, scale, *rows, exclude_diagonal=exclude)

    return step


def _ours(objective: str, path: str, options: Kernels, scale: Any, bias: Any, index: Any) -> Callable[[Any, Any], None]:
    from neuclip_scale import create_loss

    of_batch = {"num_epochs": 10} if objective == "fastclip-v3" else {}
    loss = create_loss(objective, embed_dim=options.embed_dim, dataset_size=options.batch_size, **of_batch)
    loss.to(index.device)

    def step(image: Any, text: Any) -> None:
        with computed_by(path):
            loss(image, text, scale, bias if objective == "siglip" else None, index).backward()

    return step


def _peer(name: str, scale: Any, bias: Any, device: Any) -> Callable[[Any, Any], None]:
    import open_clip.loss
    import torch

    loss = getattr(open_clip.loss, name)()

    def step(image: Any, text: Any) -> None:
        with torch.autocast(device.type, image.dtype, enabled=image.dtype.itemsize == 2):
            value = loss(image, text, scale) if name == "ClipLoss" else loss(image, text, scale, bias)
        value.backward()

    return step


def _timed(step: Callable[[Any, Any], None], options: Kernels, device: Any) -> dict[str, float]:
    """Milliseconds of one call, and the most memory that it added to its inputs'."""
    import torch
    from torch.nn.functional import normalize

    generator = torch.Generator(device).manual_seed(0)
    size = (options.batch_size, options.embed_dim)
    image = normalize(torch.randn(size, device=device, generator=generator), dim=1)
    text = normalize(image + torch.randn(size, device=device, generator=generator) / options.embed_dim**0.5, dim=1)
    image, text = (each.to(getattr(torch, options.dtype)).requires_grad_() for each in (image, text))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return timed(lambda: step(image, text), device)


def _matmul_flops(options: Kernels, device: Any) -> float:
    """FLOP/s of torch's own product in the same dtype, the best of ten: what the bound is stated for."""
    import torch

    n = 8192 if device.type == "cuda" else 256
    left, right = torch.randn(2, n, n, device=device).to(getattr(torch, options.dtype)).unbind()
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def _row(name: str, runs: list[dict[str, float]], options: Kernels, flops: float) -> dict[str, Any]:
    bound = FORMS[name.split()[0]].products * 2 * options.batch_size**2 * options.embed_dim / flops * 1e3
    return {"contender": name, "added_mib": max(run["added_mib"] for run in runs), **against_bound(runs, bound)}


def show(options: Kernels, result: dict[str, Any]) -> None:
    """Print the comparison."""
    if "needs" in result:
        print(f"kernels: needs {result['needs']}")
        return
    import torch

    inputs = 2 * options.batch_size * options.embed_dim * getattr(torch, options.dtype).itemsize / MEBIBYTE
    print(
        f"B = {options.batch_size}, d = {options.embed_dim}, {options.dtype}, inputs {inputs:.0f} MiB, "
        f"{result['device']}, torch's matmul {result['matmul_tflops']:.0f} TFLOP/s"
    )
    print(f"{'':<30}{'time':>11}{'range':>20}{'added MiB':>11}{'bound':>11}{'share':>8}")
    for row in result["rows"]:
        low, high = row["milliseconds_range"]
        print(
            f"{row['contender']:<30}{row['milliseconds']:>8.2f} ms{f'{low:.2f} to {high:.2f}':>20}"
            f"{row['added_mib']:>11.0f}{row['bound_milliseconds']:>8.2f} ms{row['share_of_bound']:>8.0%}"
        )
    for name, why in result["failures"].items():
        print(f"{name:<30}{why}")
