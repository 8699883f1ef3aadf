"""One training step beside open_clip's own trainer: `python tools/bench.py step`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_turns

PEER, PEER_PARTS = "open_clip", "open_clip, accum_freq"
OURS, OURS_PARTS, NEUCLIP = "ours, openclip", "ours, openclip, micro-batches", "ours, neuclip"
PEERS = {PEER: PEER, OURS: PEER, NEUCLIP: PEER, PEER_PARTS: PEER_PARTS, OURS_PARTS: PEER_PARTS}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Encoders, loss, backward, clipping and AdamW on a batch in memory; the same towers and batch, fp32."""

    preset: str = "demo"
    """Encoders: open_clip's are built with the same widths, layers and heads."""
    batch_size: int = 512
    """B, pairs."""
    micro_batches: int = 4
    """Parts of the batch for the contenders that split it."""
    steps: int = 3
    """Steps of one measurement, after one that is not counted."""
    threads: int = 1
    """Threads of every process."""
    repeats: int = 5
    """Measurements of each contender."""
    contenders: tuple[str, ...] = (PEER, OURS, NEUCLIP, PEER_PARTS, OURS_PARTS)
    """What to measure, by turns."""
    json: str = ""
    """Write every measurement to this file."""


def child(options: Step, contender: str) -> None:
    """Measure one contender in this process and print a JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = options.micro_batches if contender in (PEER_PARTS, OURS_PARTS) else 1
    with tempfile.TemporaryDirectory() as folder:
        if contender in (PEER, PEER_PARTS):
            steps = _open_clip(options, parts)
        else:
            steps = _ours(options, parts, "neuclip" if contender == NEUCLIP else "openclip", Path(folder))
        next(steps)  # the optimizer's state, and NeuCLIP's first prototypes

        def run() -> None:
            for _ in range(options.steps):
                next(steps)

        result = bench_turns.measured(run)
    result |= {name: result[name] / options.steps for name in ("seconds", "cpu_seconds")}
    print(json.dumps(result))


def _ours(options: Step, parts: int, objective: str, folder: Path) -> Iterator[Any]:
    """`Trainer.train_step` on the first batch of the loader."""
    from neuclip_scale import Trainer, load_recipe
    from neuclip_scale.data.synthetic import write_synthetic_shards

    write_synthetic_shards(folder / "shards", options.batch_size, options.batch_size, image_size=40, seed=0)
    settings = {
        "run_dir": str(folder / "run"), "data.train": str(folder / "shards"), "data.num_workers": 0,
        "data.num_streams": 1, "evaluation.data": "", "evaluation.normalizer_every_steps": 0, "engine.device": "cpu",
        "model.preset": options.preset, "objective.name": objective, "train.global_batch_size": options.batch_size,
        "train.micro_batch_size": options.batch_size // parts, "train.num_steps": options.steps + 1,
        "train.max_grad_norm": 1.0, "train.precision": "fp32",
    }  # fmt: skip
    trainer = Trainer(load_recipe("demo", settings))
    batch = next(iter(trainer.loader)).batch
    while True:
        yield trainer.train_step(batch)


def _open_clip(options: Step, parts: int) -> Iterator[Any]:
    """`open_clip_train.train.train_one_epoch` on a loader of one batch, with the optimizer of its main."""
    import torch
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    model = _open_clip_model(options.preset)
    single = [p for name, p in model.named_parameters() if p.ndim < 2 or "bn" in name or "ln" in name]
    known = set(map(id, single))
    groups = [
        {"params": single, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    arguments = argparse.Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=parts, skip_scheduler=False, horovod=False,
        grad_clip_norm=1.0, log_every_n_steps=10**9, rank=0, local_rank=0, world_size=1, wandb=False,
        batch_size=options.batch_size // parts, log_local=False,
    )  # fmt: skip
    loader = _OneBatch(model, options.batch_size, parts)
    data = {"train": argparse.Namespace(dataloader=loader, set_epoch=lambda epoch: None)}
    schedule = cosine_lr(optimizer, 5e-4, 2, options.steps + 1)
    epoch = 0
    while True:
        yield train_one_epoch(model, data, ClipLoss(), epoch, optimizer, None, schedule, None, arguments)
        epoch += 1


def _open_clip_model(name: str) -> Any:
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
    """What `train_one_epoch` needs of a loader: one batch, in parts."""

    def __init__(self, model: Any, batch_size: int, parts: int) -> None:
        import torch

        self.num_batches, self.num_samples = parts, batch_size
        size = model.visual.image_size[0]
        images = torch.randn(batch_size, 3, size, size)
        tokens = torch.randint(1, 40000, (batch_size, model.context_length))
        tokens[:, -1] = 49407
        each = batch_size // parts
        self._parts = list(zip(images.split(each), tokens.split(each), strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts)


def measure(options: Step) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds."""
    runs = bench_turns.by_turns(__file__, options)
    figures = {"cpu_seconds": "time_ratio", "added_mib": "memory_ratio"}
    return {"rows": bench_turns.compared(runs, PEERS, figures), "runs": runs}


def show(options: Step, result: dict[str, Any]) -> None:
    """Print the comparison."""
    print(
        f"{options.preset}, B = {options.batch_size}, whole or in {options.micro_batches} parts, fp32, "
        f"{options.threads} thread(s), commit {result['commit']}"
    )
    columns = {
        "cpu_seconds": "CPU s|.2f", "time_ratio": "of open_clip|.2f", "added_mib": "added MiB|.0f",
        "memory_ratio": "of open_clip|.3f",
    }  # fmt: skip
    bench_turns.print_rows(result["rows"], columns)


if __name__ == "__main__":
    child(bench_turns.options_of(Step, sys.argv[2]), sys.argv[1])
