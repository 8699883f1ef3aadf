"""What the NPN takes of an iteration, and how to spread it over ranks: `python tools/bench.py npn`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import bench_npn_gpu
import bench_queue_gpu
import bench_turns

FP32 = 4
"""Bytes of a number."""
RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Npn:
    """The NPN's share of an iteration, by FLOPs and measured, and two ways of spreading it over ranks."""

    preset: str = "ViT-B-32"
    """Encoders."""
    batch_size: int = 4096
    """B, pairs."""
    num_prototypes: int = 4096
    """m."""
    updates_per_step: int = 10
    """T_u."""
    restart_every: int = 500
    """T_r; a restart's time is divided by it."""
    measured_pairs: int = 8
    """Pairs that the encoders are timed with; their time is linear in the number of pairs."""
    threads: int = 1
    """Threads of torch."""
    repeats: int = 3
    """Measurements of each part; the median counts."""
    encoder_tflops: float = 400.0
    """Model: encoders on one GPU, TFLOP/s (H100 SXM at bf16, 40 % of its 989)."""
    npn_tflops: float = 40.0
    """Model: products of the NPN on one GPU, TFLOP/s (H100 SXM at fp32, 60 % of its 67)."""
    memory_gbytes: float = 2500.0
    """Model: memory of one GPU, GB/s (H100 SXM, 75 % of its 3350)."""
    node_gbytes: float = 360.0
    """Model: a rank's link inside a node, GB/s per direction (NVLink 4, 80 % of its 450)."""
    network_gbytes: float = 40.0
    """Model: a rank's link between nodes, GB/s per direction (InfiniBand at 400 Gb/s, 80 % of it)."""
    latency_us: float = 20.0
    """Model: fixed time of one all-reduce, microseconds."""
    ranks_per_node: int = 8
    """Model: ranks that share the fast links."""
    measure: bool = True
    """Whether to measure on this machine, beside counting and modelling."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure: cpu, or cuda, there torch beside Triton and with all pairs."""
    micro_batch_size: int = 512
    """On a GPU: pairs that the encoders are timed with, under bf16 autocast; they count B / this times."""
    contenders: tuple[str, ...] = (
        "torch highest", "triton highest", "torch high", "triton high", "triton medium", "triton medium graphs",
    )  # fmt: skip
    """On a GPU: who computes the NPN, and torch's precision of fp32 products; `graphs`: started as CUDA graphs."""
    queue_size: int = 65536
    """On a GPU: M, pairs in the queue of neuclip-queue, whose sums are timed beside the NPN; 0 leaves them out."""
    projected_widths: tuple[int, int] = (768, 512)
    """On a GPU: width of what the towers' last maps are given, pictures and captions, for a queue mapped anew."""
    kernels: bool = False
    """On a GPU: also time each kernel alone, with several blocks, which takes minutes of compiling."""
    peak_tflops: float = 0.0
    """On a GPU: of bf16 products, for the bound; 0 takes the data sheet's where the GPU is known, else no bound."""
    json: str = ""
    """Write the result to this file."""

    @property
    def embed_dim(self) -> int:
        """d."""
        from neuclip_scale.models.presets import get_preset

        return get_preset(self.preset).embed_dim


def check(options: Npn) -> None:
    """Raise SystemExit for what is no contender."""
    triton = [f"triton {precision}" for precision in bench_npn_gpu.PASSES]
    torch = [f"torch {precision}" for precision in bench_npn_gpu.PASSES]
    graphs = [name + bench_npn_gpu.GRAPHS for name in triton]
    bench_turns.refuse_unknown("contenders", options.contenders, (*torch, *triton, *graphs))


# --- by FLOPs --------------------------------------------------------------------------------------------------------


def flop_shares(options: Npn, encoder_flops: int) -> dict[str, Any]:
    """FLOPs of one iteration of one process by part; `encoder_flops` are a pair's, forward and backward."""
    from neuclip_scale.similarity import BatchShape

    objective = make_objective(options)
    shape = BatchShape(options.batch_size, options.batch_size, options.embed_dim)
    npn = objective.estimate_flops(shape)
    parts = {
        "encoders": encoder_flops * options.batch_size,
        "similarities": objective.flops(shape) - npn,
        "npn": npn,
    }
    whole = sum(parts.values())
    return {name: {"flops": value, "share": value / whole} for name, value in parts.items()}


def make_objective(options: Npn) -> Any:
    """NeuCLIP at this size."""
    from neuclip_scale.config import ObjectiveConfig, parse
    from neuclip_scale.objectives import create_objective
    from neuclip_scale.objectives.registry import Problem

    npn = {
        "num_prototypes": options.num_prototypes,
        "updates_per_step": options.updates_per_step,
        "restart_every": options.restart_every,
    }
    return create_objective(
        parse(ObjectiveConfig, {"name": "neuclip", "npn": npn}), Problem(embed_dim=options.embed_dim)
    )


# --- measured --------------------------------------------------------------------------------------------------------


def measured_shares(options: Npn, model: Any) -> dict[str, Any]:
    """Seconds of one iteration on this CPU by part.

    The objective runs at its full size. The encoders run `measured_pairs` and count B / measured_pairs times: their
    work and the NPN's are both linear in B, so the ratio of their FLOPs is the full size's. AdamW is timed in full.
    """
    from neuclip_scale.config import OptimConfig
    from neuclip_scale.optim import create_optimizer

    objective = objective_seconds(options)
    encoders = median_seconds(options, lambda: run_encoders(model, options.measured_pairs))
    optimizer = create_optimizer(model, OptimConfig())
    parts = {
        "encoders": encoders * options.batch_size / options.measured_pairs,
        "optimizer": median_seconds(options, optimizer.step),
        **objective,
    }
    whole = sum(parts.values())
    npn = sum(seconds for name, seconds in parts.items() if name.startswith("npn/"))
    speed = bench_turns.matmul_flops() * options.threads  # of one thread: it goes by the CPU's time
    return {
        "parts": {name: {"seconds": seconds, "share": seconds / whole} for name, seconds in parts.items()},
        "npn_seconds": npn,
        "npn_bound_seconds": flop_shares(options, 0)["npn"]["flops"] / speed,
        "npn_share": npn / whole,
        "npn_to_encoders": npn / parts["encoders"],
    }


def measured_on_gpu(options: Npn, encoder_flops: int) -> dict[str, Any]:
    """See `bench_npn_gpu`."""
    import torch

    return bench_npn_gpu.measure(options, encoder_flops, torch.device(options.device))


def queue_on_gpu(options: Npn) -> dict[str, Any]:
    """See `bench_queue_gpu`."""
    import torch

    return bench_queue_gpu.measure(options, torch.device(options.device))


def objective_seconds(options: Npn) -> dict[str, float]:
    """Medians of the sections of a step without restart, and a restart's seconds over `restart_every`."""
    import torch
    from torch.nn.functional import normalize

    from neuclip_scale.sections import StepTimer
    from neuclip_scale.similarity import PairFeatures

    torch.manual_seed(0)
    objective, steps = make_objective(options), []
    image = normalize(torch.randn(options.batch_size, options.embed_dim), dim=1)
    text = normalize(image + torch.randn_like(image) / options.embed_dim**0.5, dim=1)
    pairs, index = PairFeatures.single(image, text), torch.arange(options.batch_size)
    for step in range(options.repeats + 1):
        with StepTimer(torch.device("cpu")) as timer:
            objective(pairs, torch.tensor([1 / 0.07]), index + step * options.batch_size)
        steps.append(timer.seconds())
    first, later = steps[0], steps[1:]
    sections = {name: statistics.median(step[name] for step in later) for name in later[0]}
    # The first step restarts and stores its batch, the later ones only store.
    extra = max(0.0, first["npn/restart"] - sections["npn/restart"])
    sections["npn/restart"] += extra / options.restart_every
    sections["objective, other"] = sections.pop("other")
    return sections


def run_encoders(model: Any, pairs: int) -> None:
    """Forward and backward of `pairs` pairs; gradients add up, as in the replay of micro-batches."""
    import torch

    images = torch.zeros(pairs, 3, model.image_size, model.image_size)
    output = model(images, torch.zeros(pairs, model.context_length, dtype=torch.int64))
    (output.image_features.sum() + output.text_features.sum()).backward()


def median_seconds(options: Npn, action: Callable[[], Any]) -> float:
    """Of `repeats` calls after a first one."""
    action()
    seconds = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# --- modelled on GPUs ------------------------------------------------------------------------------------------------


def side_seconds(options: Npn, anchors: float, *, products: int, passes: int) -> float:
    """`products` of 2 b m d and `passes` over the fp32 [b, m] between them, on one GPU."""
    flops = 2 * products * anchors * options.num_prototypes * options.embed_dim
    moved = passes * FP32 * anchors * options.num_prototypes
    return flops / (options.npn_tflops * 1e12) + moved / (options.memory_gbytes * 1e9)


def update_seconds(options: Npn, anchors: float) -> float:
    """One update of one side: written, masked (2), largest, subtracted (2), exponentiated (2), summed, multiplied."""
    return side_seconds(options, anchors, products=2, passes=10)


def all_reduce_bytes(options: Npn, world_size: int) -> float:
    """What each rank of a ring sends for one [m, d] gradient."""
    return 2 * (world_size - 1) / world_size * FP32 * options.num_prototypes * options.embed_dim


def all_reduce_seconds(options: Npn, world_size: int) -> float:
    """One all-reduce of an [m, d] gradient over the slowest link of the ring."""
    inside = world_size <= options.ranks_per_node
    link = options.node_gbytes if inside else options.network_gbytes
    return options.latency_us / 1e6 + all_reduce_bytes(options, world_size) / (link * 1e9)


def spread(options: Npn, world_size: int) -> dict[str, Any]:
    """T_u updates of both sides: anchors sharded and gradients summed, against all anchors on every rank.

    `node_ms` is of a third way: every node takes all anchors, and its ranks share them.
    """
    updates, local = 2 * options.updates_per_step, options.batch_size / world_size
    products = 4 * options.num_prototypes * options.embed_dim
    sharded = updates * (update_seconds(options, local) + all_reduce_seconds(options, world_size))
    replicated = updates * update_seconds(options, options.batch_size)
    in_node = min(world_size, options.ranks_per_node)
    node = updates * (update_seconds(options, options.batch_size / in_node) + all_reduce_seconds(options, in_node))
    # Sharding saves 1 - 1/W of the work per anchor and costs an all-reduce.
    saved = update_seconds(options, 1) * (1 - 1 / world_size)
    return {
        "world_size": world_size,
        "sharded": {
            "flops": updates * products * local,
            "bytes": updates * all_reduce_bytes(options, world_size),
            "ms": 1e3 * sharded,
        },
        "replicated": {"flops": updates * products * options.batch_size, "bytes": 0, "ms": 1e3 * replicated},
        "node_ms": 1e3 * node,
        "faster": "sharded" if sharded < replicated else "replicated",
        "crossing_batch_size": math.ceil(all_reduce_seconds(options, world_size) / saved),
    }


def modelled_share(options: Npn, encoder_flops: int, world_size: int) -> float:
    """The NPN's part of encoders and NPN together, in the faster of both ways."""
    local = options.batch_size / world_size
    updates = 2 * options.updates_per_step * update_seconds(options, local)
    if world_size > 1:
        ways = spread(options, world_size)
        updates = min(ways["sharded"]["ms"], ways["replicated"]["ms"]) / 1e3
    npn = updates + 2 * side_seconds(options, local, products=1, passes=9)
    return npn / (npn + encoder_flops * local / (options.encoder_tflops * 1e12))


# --- the command -----------------------------------------------------------------------------------------------------


def measure(options: Npn) -> dict[str, Any]:
    """Everything that --json holds, but for the options."""
    import torch

    from neuclip_scale.models.building import create_model
    from neuclip_scale.models.presets import get_preset
    from neuclip_scale.telemetry.flops import count_encoder_flops

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = create_model(get_preset(options.preset))
    flops = count_encoder_flops(model).training
    return {
        "embed_dim": options.embed_dim,
        "encoder_flops_per_pair": flops,
        "by_flops": flop_shares(options, flops),
        "measured": measured_shares(options, model) if options.measure and options.device == "cpu" else None,
        "gpu": measured_on_gpu(options, flops) if options.measure and options.device != "cpu" else None,
        "queue": queue_on_gpu(options) if options.measure and options.device != "cpu" and options.queue_size else None,
        "modelled_share": {str(ranks): modelled_share(options, flops, ranks) for ranks in (1, *RANKS)},
        "spreading": [spread(options, ranks) for ranks in RANKS],
    }


def show(options: Npn, result: dict[str, Any]) -> None:
    """Print it."""
    o, flops, measured = options, result["by_flops"], result["measured"]
    print(
        f"{o.preset}, B = {o.batch_size}, m = {o.num_prototypes}, d = {o.embed_dim}, T_u = {o.updates_per_step}, "
        f"T_r = {o.restart_every}; encoders {result['encoder_flops_per_pair'] / 1e9:.2f} GFLOPs a pair, both passes"
    )
    print("\nby FLOPs, one process")
    for name, part in flops.items():
        print(f"  {name:<24}{part['flops'] / 1e12:>10.3f} TFLOPs{part['share']:>9.2%}")
    print(f"  NPN : encoders = 1 : {flops['encoders']['flops'] / flops['npn']['flops']:.1f}")
    if measured is not None:
        show_measured(options, measured)
    if result["gpu"] is not None:
        bench_npn_gpu.show(options, result["gpu"])
    if result["queue"] is not None:
        bench_queue_gpu.show(options, result["queue"])
    print(
        f"\nmodelled on GPUs: encoders {o.encoder_tflops:g} and NPN {o.npn_tflops:g} TFLOP/s, memory "
        f"{o.memory_gbytes:g}, node {o.node_gbytes:g}, network {o.network_gbytes:g} GB/s,\n{o.latency_us:g} us an "
        f"all-reduce, {o.ranks_per_node} ranks a node; updates of both sides"
    )
    print(f"  {'W':>3}{'sharded':>29}{'replicated':>20}{'by node':>11}{'faster':>12}{'sharded from B':>16}{'share':>8}")
    for row in result["spreading"]:
        sharded, whole, ranks = row["sharded"], row["replicated"], row["world_size"]
        left = f"{sharded['flops'] / 1e9:.1f} GF {sharded['bytes'] / 1e6:.0f} MB {sharded['ms']:.2f} ms"
        right = f"{whole['flops'] / 1e9:.0f} GF {whole['ms']:.2f} ms"
        node, crossing = f"{row['node_ms']:.2f} ms", row["crossing_batch_size"]
        share = result["modelled_share"][str(ranks)]
        print(f"  {ranks:>3}{left:>29}{right:>20}{node:>11}{row['faster']:>12}{crossing:>16}{share:>8.1%}")
    print(f"  NPN's share of encoders and NPN on one GPU: {result['modelled_share']['1']:.1%}")


def show_measured(options: Npn, measured: dict[str, Any]) -> None:
    """Print what was measured, and what was scaled."""
    o = options
    print(
        f"\nmeasured on this CPU, fp32, {o.threads} thread(s). Scaled: the encoders' time, from {o.measured_pairs} "
        "pairs to B. Their work and\nthe NPN's are linear in B, so the ratio of FLOPs is the one above; m, d, T_u and "
        "the NPN's B are the full ones."
    )
    for name, part in measured["parts"].items():
        print(f"  {name:<24}{part['seconds']:>10.3f} s     {part['share']:>9.2%}")
    print(f"  {'NPN in all':<24}{measured['npn_seconds']:>10.3f} s     {measured['npn_share']:>9.2%}")
    print(f"  {'bound, its products':<24}{measured['npn_bound_seconds']:>10.3f} s, at the speed of one of 1024^3 here")
    print(f"  NPN : encoders = 1 : {1 / measured['npn_to_encoders']:.1f}")
