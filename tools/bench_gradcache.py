"""What gradient caching costs over one graph for the whole batch: `python tools/bench.py gradcache`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_turns

PLAIN, WHOLE, OURS, PEER = "plain", "ours, one micro-batch", "ours", "GradCache-style"
FIRST = 0.0
KEPT = {
    "ours, nothing kept": (None, ""),
    "ours, text kept": (FIRST, "text"),
    "ours, image kept": (FIRST, "image"),
    "ours, a quarter kept": (0.25, ""),
    "ours, half kept": (0.5, ""),
    "ours, half and text kept": (0.5, "text"),
}
"""The share of the micro-batches whose activations are kept, the first one at least, and a tower of which all are."""


@dataclass(frozen=True, kw_only=True)
class GradCache:
    """Forward, InfoNCE and backward of both towers, without the optimizer, fp32."""

    preset: str = "demo"
    """Encoders."""
    batch_size: int = 1024
    """B, pairs."""
    micro_batch_size: int = 128
    """Pairs that are encoded together, by `ours` and the peer."""
    threads: int = 1
    """Threads of every process."""
    steps: int = 1
    """Steps of one measurement."""
    repeats: int = 5
    """Measurements of each contender."""
    contenders: tuple[str, ...] = (PLAIN, WHOLE, OURS, *KEPT, PEER)
    """What to measure, by turns; the first is what the others are compared with."""
    json: str = ""
    """Write every measurement to this file."""


def child(options: GradCache, contender: str) -> None:
    """Measure one contender in this process and print a JSON line."""
    import torch

    from neuclip_scale.models.building import create_model
    from neuclip_scale.models.presets import get_preset
    from neuclip_scale.telemetry.flops import count_encoder_flops

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = create_model(get_preset(options.preset)).train()
    step = {PLAIN: _plain, PEER: _grad_cache}.get(contender, partial(_ours, kept=KEPT.get(contender, (FIRST, ""))))
    micro = options.batch_size if contender == WHOLE else options.micro_batch_size
    few = min(options.batch_size, 2 * options.micro_batch_size)
    step(model, _batch(model, few), min(micro, few))  # load kernels
    model.zero_grad(set_to_none=True)
    batch = _batch(model, options.batch_size)

    def run() -> None:
        for _ in range(options.steps):
            step(model, batch, micro)
            model.zero_grad(set_to_none=True)

    result = bench_turns.measured(run)
    flops = count_encoder_flops(model).training * options.batch_size * options.steps
    print(json.dumps({**result, "bound_seconds": flops / bench_turns.matmul_flops()}))


def _batch(model: Any, size: int) -> Any:
    import torch

    from neuclip_scale.data.batch import Batch

    images = torch.randn(size, 3, model.image_size, model.image_size)
    tokens = torch.randint(1, 40000, (size, model.context_length))
    tokens[:, -1] = 49407
    return Batch(images, tokens, torch.arange(size), tuple(map(str, range(size))))


def _plain(model: Any, batch: Any, micro_batch_size: int) -> None:
    """One graph, open_clip's loss: what fits in memory needs no more."""
    from open_clip.loss import ClipLoss

    output = model(batch.images, batch.tokens)
    ClipLoss()(output.image_features, output.text_features, output.logit_scale).backward()


def _ours(model: Any, batch: Any, micro_batch_size: int, kept: tuple[float | None, Any]) -> None:
    """As `Trainer.train_step` does it, with the engine's `backward` of one process."""
    import torch

    from neuclip_scale.config import ObjectiveConfig
    from neuclip_scale.engines.base import inputs
    from neuclip_scale.grad_cache import CachedFeatures, KeptActivations
    from neuclip_scale.objectives import create_objective
    from neuclip_scale.objectives.registry import Problem
    from neuclip_scale.similarity import PairFeatures

    def alone(*, is_last: bool) -> Any:
        return nullcontext()

    def encode(part: Any, towers: Any = "both") -> Any:
        return model(*inputs(part, towers))

    parts, (share, tower) = batch.split(micro_batch_size), kept
    number = 0 if share is None else max(1, int(share * len(parts)))
    cached = CachedFeatures(encode, model, parts, alone, KeptActivations(number, tower))
    objective = create_objective(ObjectiveConfig(name="openclip"), Problem(embed_dim=model.embed_dim))
    output = objective(PairFeatures.single(cached.image, cached.text), cached.logit_scale)
    for rows, encoded in cached.replay():
        total = (encoded.image_features * output.image_gradient[rows]).sum()
        total = total + (encoded.text_features * output.text_gradient[rows]).sum()
        is_last = rows.stop == len(batch)
        total = total + (encoded.logit_scale * (output.logit_scale_gradient if is_last else torch.zeros(1))).sum()
        total.backward()


def _grad_cache(model: Any, batch: Any, micro_batch_size: int) -> None:
    """The published recipe (arXiv 2101.06983) around open_clip's loss: chunks without a graph, their random states,
    the loss's gradients by the features, chunks again with a graph."""
    import torch
    from open_clip.loss import ClipLoss

    parts, states, outputs = batch.split(micro_batch_size), [], []
    with torch.no_grad():
        for part in parts:
            states.append(torch.get_rng_state())
            outputs.append(model(part.images, part.tokens))
    image, text = (torch.cat([output[side] for output in outputs]).requires_grad_() for side in range(2))
    scale = outputs[0].logit_scale.detach().requires_grad_()
    ClipLoss()(image, text, scale).backward()
    gradients = zip(image.grad.split(micro_batch_size), text.grad.split(micro_batch_size), strict=True)
    for number, (part, state, (of_image, of_text)) in enumerate(zip(parts, states, gradients, strict=True)):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            output = model(part.images, part.tokens)
        surrogate = (output.image_features * of_image).sum() + (output.text_features * of_text).sum()
        if number == 0:
            surrogate = surrogate + (output.logit_scale * scale.grad).sum()
        surrogate.backward()


def check(options: GradCache) -> None:
    """Raise SystemExit for what is no contender."""
    bench_turns.refuse_unknown("contenders", options.contenders, (PLAIN, WHOLE, OURS, *KEPT, PEER))


def measure(options: GradCache) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds."""
    runs = bench_turns.by_turns(__file__, options)
    peers = dict.fromkeys(options.contenders, options.contenders[0])
    rows = bench_turns.compared(runs, peers, {"cpu_seconds": "time_ratio", "added_mib": "memory_ratio"})
    return {"rows": bench_turns.with_bounds(rows, runs), "runs": runs}


def show(options: GradCache, result: dict[str, Any]) -> None:
    """Print the comparison."""
    print(
        f"{options.preset}, B = {options.batch_size}, micro-batches of {options.micro_batch_size}, fp32, "
        f"{options.threads} thread(s), commit {result['commit']}"
    )
    columns = {
        "cpu_seconds": "CPU s|.2f", "time_ratio": f"of {options.contenders[0]}|.2f", "added_mib": "added MiB|.0f",
        "memory_ratio": f"of {options.contenders[0]}|.3f", "bound_seconds": "bound|.2f", "share_of_bound": "share|.0%",
    }  # fmt: skip
    bench_turns.print_rows(result["rows"], columns)


if __name__ == "__main__":
    child(bench_turns.options_of(GradCache, sys.argv[2]), sys.argv[1])
