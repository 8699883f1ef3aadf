"""One training step beside open_clip's own trainer: `python tools/bench.py step`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bench_step_gpu
import bench_turns

RECIPE = "demo"
"""Ours is this one, but for what a section's options and a contender's name say."""
PEER, PEER_PARTS = "open_clip", "open_clip, accum_freq"
OURS, OURS_PARTS, NEUCLIP = "ours, openclip", "ours, openclip, micro-batches", "ours, neuclip"
KEPT = OURS_PARTS + ", two kept"
GRAPHS, KEPT_GRAPHS = OURS_PARTS + ", graphs", KEPT + ", graphs"
"""Of compiled towers alone: give them with ", compiled"."""
WITH_GRAPHS, WITH_KEPT = {"model.cuda_graphs": True, "model.pack_captions": False}, {"train.kept_micro_batches": 2}
VARIANTS = {
    KEPT: WITH_KEPT,
    GRAPHS: WITH_GRAPHS,
    KEPT_GRAPHS: WITH_GRAPHS | WITH_KEPT,
    "ours, openclip, checkpointed": {"model.grad_checkpointing": True},
    "ours, openclip, fsdp2": {"engine.name": "fsdp2"},
    "ours, openclip, fsdp2, resharding": {"engine.name": "fsdp2", "engine.fsdp.reshard_after_forward": True},
}
"""What else a recipe may say. FSDP2 is of one rank, so what is seen is what hooks and copies cost, and no network."""
PEERS = {
    PEER: PEER,
    OURS: PEER,
    NEUCLIP: PEER,
    PEER_PARTS: PEER_PARTS,
    OURS_PARTS: PEER_PARTS,
    **dict.fromkeys(VARIANTS, PEER),
    **dict.fromkeys((KEPT, GRAPHS, KEPT_GRAPHS), PEER_PARTS),
}
SPLIT = (PEER_PARTS, OURS_PARTS, KEPT, GRAPHS, KEPT_GRAPHS)
"""Contenders that take the batch in parts."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Encoders, loss, backward, clipping and AdamW on a batch in memory; the same towers and batch."""

    preset: str = "demo"
    """Encoders: open_clip's are built with the same widths, layers and heads."""
    batch_size: int = 512
    """B, pairs."""
    caption_tokens: float = 0.0
    """Mean tokens of a caption, start and end included, lengths drawn from a log-normal law (sigma 0.6); 0: as long as
    the context."""
    micro_batches: int = 4
    """Parts of the batch for the contenders that split it."""
    steps: int = 3
    """Steps of one measurement, after one that is not counted."""
    threads: int = 1
    """Threads of every process."""
    repeats: int = 5
    """Measurements of each contender."""
    contenders: tuple[str, ...] = (PEER, OURS, NEUCLIP, PEER_PARTS, OURS_PARTS)
    """What to measure, by turns; on a GPU a name may end in ", compiled"."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure; CUDA_VISIBLE_DEVICES chooses among several GPUs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 or bf16 (autocast)."""
    json: str = ""
    """Write every measurement to this file."""


def child(options: Step, contender: str) -> None:
    """Measure one contender in this process and print a JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = options.micro_batches if contender in SPLIT else 1
    with tempfile.TemporaryDirectory() as folder:
        if contender in (PEER, PEER_PARTS):
            steps = open_clip_steps(options, parts)
        else:
            steps = our_steps(options, parts, contender, Path(folder))
        parameters = next(steps)  # the optimizer's state, and NeuCLIP's first prototypes
        free_gradients(parameters)
        result = bench_turns.measured(lambda: next(steps))
    result |= {name: result[name] / options.steps for name in ("seconds", "cpu_seconds")}
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
    result["bound_seconds"] = bench_step_gpu.useful_flops(options) / bench_turns.matmul_flops(dtype)
    print(json.dumps(result))


def free_gradients(parameters: Sequence[Any]) -> None:
    """Let a measurement begin without gradients. Ours frees them at a step's end, open_clip at the next one's start:
    left as they are they would count as added by ours and as there before for open_clip.
    """
    for parameter in parameters:
        parameter.grad = None


def our_steps(options: Step, parts: int, contender: str, folder: Path, *, compiled: bool = False) -> Iterator[Any]:
    """`Trainer.train_step` on one batch: first one step, then `options.steps` each time. Yields the parameters."""
    import torch

    from neuclip_scale import Trainer, load_recipe
    from neuclip_scale.data.loader import LoadedBatch
    from neuclip_scale.data.synthetic import write_synthetic_shards
    from neuclip_scale.launched_step import QueuedNumbers

    write_synthetic_shards(folder / "shards", options.batch_size, options.batch_size, image_size=40, seed=0)
    settings = {
        "run_dir": str(folder / "run"), "data.train": str(folder / "shards"), "data.num_workers": 0,
        "data.num_streams": 1, "evaluation.data": "", "evaluation.normalizer_every_steps": 0,
        "engine.device": options.device, "model.preset": options.preset, "model.compile": compiled,
        "objective.name": "neuclip" if contender == NEUCLIP else "openclip",
        "train.global_batch_size": options.batch_size,
        "train.micro_batch_size": options.batch_size // parts, "train.num_steps": options.steps + 1,
        "train.max_grad_norm": 1.0, "train.precision": options.precision, **VARIANTS.get(contender, {}),
    }  # fmt: skip
    trainer = Trainer(load_recipe(RECIPE, settings))
    batch, count = our_batch(trainer, options), 1
    digests = torch.zeros(1, dtype=torch.int64)
    loaded = LoadedBatch(batch, {0: 0}, digests, digests, [], options.batch_size)
    while True:
        before: QueuedNumbers | None = None
        for _ in range(count):  # `fit` reads a step's numbers when it has launched the next
            launched = QueuedNumbers(trainer.train_step(batch), loaded)
            if before is not None:
                before.read()
            before = launched
        launched.read()
        yield tuple(trainer.engine.module.parameters())
        count = options.steps


def our_batch(trainer: Any, options: Step) -> Any:
    """Pictures and captions of noise where the trainer's model is."""
    import torch

    from neuclip_scale.data.batch import Batch, caption_lengths

    model, size = trainer.engine.module, options.batch_size
    images, tokens = noise(size, model.image_size, model.context_length, options.caption_tokens)
    indices, uids = torch.arange(size), tuple(map(str, range(size)))
    return Batch(images, tokens, indices, uids, text_lengths=caption_lengths(tokens)).to(trainer.device)


def noise(size: int, image_size: int, context_length: int, caption_tokens: float = 0.0) -> tuple[Any, Any]:
    """Pictures [size, 3, H, W] and tokens [size, L]; the same captions in every process."""
    import torch

    tokens = torch.randint(1, 40000, (size, context_length))
    lengths = torch.full((size,), context_length)
    if caption_tokens:
        normal = torch.randn(size, generator=torch.Generator().manual_seed(0))
        drawn = (caption_tokens - 2) * torch.exp(0.6 * normal - 0.18)  # of this mean
        lengths = (2 + drawn.round().long()).clamp(3, context_length)
    tokens[torch.arange(context_length) >= lengths[:, None]] = 0
    tokens[torch.arange(size), lengths - 1] = 49407
    return torch.randn(size, 3, image_size, image_size), tokens


def open_clip_steps(options: Step, parts: int, *, compiled: bool = False) -> Iterator[Any]:
    """`open_clip_train.train.train_one_epoch` on one batch, with the optimizer of its main: first an epoch of one step,
    then of `options.steps` each time. Yields the parameters.
    """
    import torch
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    model = open_clip_model(options.preset).to(options.device)
    single = [p for name, p in model.named_parameters() if p.ndim < 2 or "bn" in name or "ln" in name]
    known = set(map(id, single))
    groups = [
        {"params": single, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    loader = _OneBatch(model, options, parts)
    if compiled:
        model = torch.compile(model)
    arguments = argparse.Namespace(
        device=options.device, precision={"fp32": "fp32", "bf16": "amp_bf16"}[options.precision], distill=False,
        accum_freq=parts, skip_scheduler=False, horovod=False,
        grad_clip_norm=1.0, log_every_n_steps=10**9, rank=0, local_rank=0, world_size=1, wandb=False,
        batch_size=options.batch_size // parts, log_local=False,
    )  # fmt: skip
    data = {"train": argparse.Namespace(dataloader=loader, set_epoch=lambda epoch: None)}
    schedule = cosine_lr(optimizer, 5e-4, 2, 1000)
    epoch = 0
    while True:
        train_one_epoch(model, data, ClipLoss(), epoch, optimizer, None, schedule, None, arguments)
        yield tuple(model.parameters())
        epoch += 1
        loader.repeat(options.steps)


def open_clip_model(name: str) -> Any:
    """open_clip's towers with the widths, layers and heads of a preset of ours."""
    from open_clip import CLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    from neuclip_scale.models.presets import get_preset

    preset = get_preset(name)
    image, text = preset.image, preset.text
    return CLIP(
        embed_dim=preset.embed_dim,
        vision_cfg=CLIPVisionCfg(
            layers=image.layers, width=image.width, head_width=image.width // image.heads,
            patch_size=image.patch_size, image_size=preset.image_size,
        ),
        text_cfg=CLIPTextCfg(
            context_length=text.context_length, vocab_size=text.vocab_size, width=text.width, heads=text.heads,
            layers=text.layers,
        ),
        output_dict=True,
    )  # fmt: skip


class _OneBatch:
    """What `train_one_epoch` needs of a loader: one batch, in parts, some times over."""

    def __init__(self, model: Any, options: Step, parts: int) -> None:
        self._size = options.batch_size
        batch = noise(self._size, model.visual.image_size[0], model.context_length, options.caption_tokens)
        images, tokens = (each.to(options.device).split(self._size // parts) for each in batch)
        self._parts = list(zip(images, tokens, strict=True))
        self.repeat(1)

    def repeat(self, count: int) -> None:
        """Make an epoch of `count` steps."""
        self._count = count
        self.num_batches, self.num_samples = len(self._parts) * count, self._size * count

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts * self._count)


def check(options: Step) -> None:
    """Raise SystemExit for what is no contender on the device, and for a batch that cannot be split evenly."""
    known = [name for name in PEERS if name not in (GRAPHS, KEPT_GRAPHS)]
    if options.device == "cuda":
        known += [name + bench_step_gpu.COMPILED for name in PEERS]
    bench_turns.refuse_unknown("contenders", options.contenders, known, f" with --device {options.device}")
    parts = options.micro_batches
    is_split = bool(set(SPLIT) & {name.removesuffix(bench_step_gpu.COMPILED) for name in options.contenders})
    if is_split and (parts < 1 or options.batch_size % parts):
        reason = f"it does not divide --batch-size {options.batch_size}, so contenders would take other batches"
        raise SystemExit(f"--micro-batches {parts}: {reason}. Give a divisor.")


def measure(options: Step) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds."""
    if options.device == "cuda":
        return bench_step_gpu.measure(options) | npn_sizes()
    runs = bench_turns.by_turns(__file__, options)
    figures = {"cpu_seconds": "time_ratio", "added_mib": "memory_ratio"}
    rows = bench_turns.with_bounds(bench_turns.compared(runs, PEERS, figures), runs)
    return {**npn_sizes(), "rows": rows, "runs": runs}


def npn_sizes() -> dict[str, int]:
    """m and T_u of `NEUCLIP`, which the recipe sets."""
    from neuclip_scale import load_recipe

    npn = load_recipe(RECIPE, {}).objective.npn
    return {"num_prototypes": npn.num_prototypes, "updates_per_step": npn.updates_per_step}


def show(options: Step, result: dict[str, Any]) -> None:
    """Print the comparison."""
    if options.device == "cuda":
        bench_step_gpu.show(options, result)
        return
    print(
        f"{options.preset}, B = {options.batch_size}, whole or in {options.micro_batches} parts, {options.precision}, "
        f"{options.threads} thread(s), commit {result['commit']}"
    )
    columns = {
        "cpu_seconds": "CPU s|.2f", "time_ratio": "of open_clip|.2f", "added_mib": "added MiB|.0f",
        "memory_ratio": "of open_clip|.3f", "bound_seconds": "bound|.2f", "share_of_bound": "share|.0%",
    }  # fmt: skip
    bench_turns.print_rows(result["rows"], columns)


if __name__ == "__main__":
    child(bench_turns.options_of(Step, sys.argv[2]), sys.argv[1])
