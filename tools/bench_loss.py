"""Contrastive losses of one process, forward and backward, beside open_clip's: `python tools/bench.py loss`."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import bench_turns

CLIP, SIGLIP, SIGLIP_CHUNKS = "open_clip.ClipLoss", "open_clip.SigLipLoss", "SigLipLoss in chunks"
OBJECTIVE = "neuclip without its NPN"
"""What is left of neuclip's time when predictions, updates and restarts of the prototypes are taken away."""
OF_SIGLIP = (SIGLIP, SIGLIP_CHUNKS, "siglip")
"""Contenders whose peer is `SIGLIP_CHUNKS`; that of all others is `CLIP`."""
FIGURES = {"cpu_seconds": "time_ratio", "added_mib": "memory_ratio"}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Forward and backward of the contrastive losses over one process's batch, fp32."""

    batch_size: int = 8192
    """B, pairs."""
    embed_dim: int = 512
    """d, embedding width."""
    threads: int = 1
    """Threads of every process."""
    repeats: int = 3
    """Measurements of each contender."""
    contenders: tuple[str, ...] = (
        CLIP, "openclip", "fastclip-v3", "neuclip", SIGLIP, SIGLIP_CHUNKS, "siglip",
    )  # fmt: skip
    """What to measure, by turns."""
    tile_size: int = 1024
    """Edge of our similarity tiles at most."""
    chunk_size: int = 1024
    """Images of a chunk in `SigLipLoss in chunks`."""
    scaling: tuple[int, ...] = ()
    """Batches to measure `openclip` with, in place of the comparison, and fit the exponents of time and memory."""
    json: str = ""
    """Write every measurement to this file."""


def child(options: Loss, contender: str) -> None:
    """Measure one contender in this process and print a JSON line."""
    import torch
    from torch.nn.functional import normalize

    from neuclip_scale.sections import StepTimer

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    B, d = options.batch_size, options.embed_dim
    loss = _make_loss(contender, options)
    start = 10.0 if contender in OF_SIGLIP else 1 / 0.07
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (start, -10.0))
    matmul_seconds = _matmul_seconds(B, d)

    def features(count: int) -> tuple[Any, Any]:
        image = normalize(torch.randn(count, d), dim=1)
        text = normalize(image + torch.randn(count, d) / d**0.5, dim=1)
        return image.requires_grad_(), text.requires_grad_()

    index, few = torch.arange(B), min(B, 256)
    for _ in range(2):  # load kernels; the u table and the NPN start in their first step
        image, text = features(few)
        loss(image, text, scale, bias, index[:few]).backward()
    image, text = features(B)
    with StepTimer(torch.device("cpu")) as timer:
        result = bench_turns.measured(lambda: loss(image, text, scale, bias, index).backward())
    npn = sum(seconds for name, seconds in timer.seconds().items() if name.startswith("npn/"))
    print(json.dumps({**result, "matmul_seconds": matmul_seconds, "npn_seconds": npn}))


def _make_loss(contender: str, options: Loss) -> Any:
    if contender == CLIP:
        from open_clip.loss import ClipLoss

        clip = ClipLoss()
        return lambda image, text, scale, bias, index: clip(image, text, scale)
    if contender == SIGLIP:
        from open_clip.loss import SigLipLoss

        siglip = SigLipLoss()
        return lambda image, text, scale, bias, index: siglip(image, text, scale, bias)
    if contender == SIGLIP_CHUNKS:
        return _SigLipInChunks(options.chunk_size)
    from neuclip_scale import create_loss

    sizes = {"dataset_size": options.batch_size, "global_batch_size": options.batch_size, "num_epochs": 10}
    loss = create_loss(contender, embed_dim=options.embed_dim, tile_size=options.tile_size, **sizes)
    own = contender == "siglip"
    return lambda image, text, scale, bias, index: loss(image, text, scale, bias if own else None, sample_index=index)


class _SigLipInChunks:
    """`SigLipLoss`'s formula for some images at a time, each with its own backward pass: three products and
    no B x B matrix. open_clip 3.3.0 as released has no option for it.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(self, image: Any, text: Any, scale: Any, bias: Any, index: Any) -> _SigLipInChunks:
        self._given = image, text, scale, bias
        return self

    def backward(self) -> None:
        """Forward and backward of all chunks."""
        import torch
        from torch.nn.functional import logsigmoid

        image, text, scale, bias = self._given
        for first in range(0, len(image), self.chunk_size):
            logits = scale * image[first : first + self.chunk_size] @ text.T + bias
            labels = -torch.ones_like(logits)
            labels.diagonal(first).fill_(1)
            (-logsigmoid(labels * logits).sum() / len(image)).backward()


def _matmul_seconds(B: int, d: int) -> float:
    """Seconds of one product of 2 B^2 d FLOPs, done in slices so that it needs no B x B matrix."""
    import torch

    left, right, out = torch.randn(1024, d), torch.randn(1024, d), torch.empty(1024, 1024)
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for _ in range(8):
            torch.mm(left, right.T, out=out)
        best = min(best, (time.process_time() - began) / 8)
    return best * (B / 1024) ** 2


def check(options: Loss) -> None:
    """Raise SystemExit for what is no loss, and for sizes through which no line can be laid."""
    from neuclip_scale.objectives.registry import OBJECTIVES

    ours = [name for name in OBJECTIVES if name != "exact"]  # which encodes a whole data set
    bench_turns.refuse_unknown("contenders", options.contenders, (CLIP, SIGLIP, SIGLIP_CHUNKS, *ours))
    if options.scaling and (len(set(options.scaling)) < 2 or min(options.scaling) < 1):
        given = " ".join(map(str, options.scaling))
        raise SystemExit(f"--scaling {given}: growth is fitted to several sizes. Give two or more, each 1 or more.")


def measure(options: Loss) -> dict[str, Any]:
    """All contenders by turns, or all sizes; returns what --json holds."""
    if options.scaling:
        return _scaling(options)
    runs = bench_turns.by_turns(__file__, options)
    if "neuclip" in runs:
        runs[OBJECTIVE] = [
            {
                "cpu_seconds": run["cpu_seconds"] * (1 - run["npn_seconds"] / run["seconds"]),
                "matmul_seconds": run["matmul_seconds"],
            }
            for run in runs["neuclip"]
        ]
    peers = {name: SIGLIP_CHUNKS if name in OF_SIGLIP else CLIP for name in runs}
    rows = bench_turns.compared(runs, peers, FIGURES)
    for row in rows:
        # InfoNCE and the margin losses need the tiles twice and two gradients, SigLIP the tiles once: fewer products
        # would mean keeping the B x B matrix.
        products = 3 if row["contender"] in OF_SIGLIP else 4
        each = runs[row["contender"]]
        row["bound_seconds"] = products * statistics.median(run["matmul_seconds"] for run in each)
        row["share_of_bound"] = row["bound_seconds"] / row["cpu_seconds"]
        if "openclip" in runs:
            pairs = zip(each, runs["openclip"], strict=True)
            row["to_openclip"] = statistics.median(run["cpu_seconds"] / other["cpu_seconds"] for run, other in pairs)
    return {"rows": rows, "runs": runs}


def _scaling(options: Loss) -> dict[str, Any]:
    rows = []
    for size in options.scaling:
        at = dataclasses.replace(options, batch_size=size, contenders=("openclip",))
        runs = bench_turns.by_turns(__file__, at)
        rows += bench_turns.compared(runs, {}, FIGURES)
        rows[-1] |= {"contender": f"B = {size}", "batch_size": size}
    return {
        "rows": rows,
        "time_exponent": _exponent(rows, "cpu_seconds"),
        "memory_exponent": _exponent(rows, "added_mib"),
    }


def _exponent(rows: list[dict[str, Any]], figure: str) -> float:
    """Slope of the least-squares line through the logarithms of a figure over those of B."""
    points = [(math.log(row["batch_size"]), math.log(max(row[figure], 1e-9))) for row in rows]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def show(options: Loss, result: dict[str, Any]) -> None:
    """Print the comparison."""
    size = f"d = {options.embed_dim}" if options.scaling else f"B = {options.batch_size}, d = {options.embed_dim}"
    print(f"{size}, fp32, {options.threads} thread(s), commit {result['commit']}")
    if options.scaling:
        bench_turns.print_rows(result["rows"], {"cpu_seconds": "CPU s|.3f", "added_mib": "added MiB|.0f"})
        print(f"time ~ B^{result['time_exponent']:.2f}, memory ~ B^{result['memory_exponent']:.2f}")
        return
    columns = {
        "cpu_seconds": "CPU s|.2f", "time_ratio": "of peer|.2f", "to_openclip": "of ours, openclip|.2f",
        "added_mib": "added MiB|.0f", "memory_ratio": "of peer|.3f", "bound_seconds": "bound|.2f",
        "share_of_bound": "share|.0%",
    }  # fmt: skip
    bench_turns.print_rows(result["rows"], columns)


if __name__ == "__main__":
    child(bench_turns.options_of(Loss, sys.argv[2]), sys.argv[1])
