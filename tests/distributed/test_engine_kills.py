"""Ranks of sharded engines killed at random moments while they train and a thread writes their checkpoint."""

from __future__ import annotations

import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import FORKSERVER, preload, preload_deepspeed, preload_training
from kill_helpers import newest_of_intact, rest_of, was_interrupted
from ports import free_ports

from neuclip_scale import checkpoint, distributed
from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines import Engine, create_engine
from neuclip_scale.models.building import create_model
from neuclip_scale.models.presets import Preset, TextTransformerConfig, VisionTransformerConfig

pytestmark = pytest.mark.distributed

preload_training()
preload_deepspeed()
preload(__name__)
WORLD_SIZE, KILLS = 2, 8  # and 40 of a single process in test_checkpoint_kills.py

# 25,000 parameters, so that a save takes milliseconds: most of its time is then between the files.
TINY = Preset(
    embed_dim=8,
    image=VisionTransformerConfig(patch_size=8, width=16, layers=2, heads=2),
    text=TextTransformerConfig(width=16, layers=2, heads=2, context_length=8, vocab_size=500),
    image_size=16,
)


def step(engine: Engine) -> None:
    batch = Batch(
        images=torch.randn(4, 3, 16, 16),
        tokens=torch.randint(1, 500, (4, 8)),
        sample_index=torch.arange(4),
        uids=list("abcd"),
    )
    with engine.micro_step(is_last=True):
        output = engine.encode(batch)
        engine.backward(output, torch.randn(4, 8), torch.randn(4, 8), torch.ones(1))
    engine.step(0.0)


def total(named_state: dict[str, dict[str, torch.Tensor]]) -> float:
    return sum(float(tensor.double().sum()) for tensors in named_state.values() for tensor in tensors.values())


def train_and_save(rank: int, port: int, folder: Path, recipe: Recipe, reports: Connection) -> None:
    """Go on from the newest checkpoint; save, train on while the bytes are written, finish, report."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    device = distributed.initialize("cpu")
    engine = create_engine(create_model(TINY), recipe, device)
    newest = distributed.on_main(lambda: checkpoint.latest_checkpoint(folder))
    done = 0
    if newest is not None:
        shared, ranks = checkpoint.load_all_ranks(newest)
        checkpoint.load_parameters(engine, ranks)
        done = shared["step"]
        now = total(dict(engine.named_state()))
        assert abs(now - shared["total"]) < 1e-6 * abs(now)
    while True:
        done += 1
        step(engine)
        state = dict(engine.named_state())
        shared = {"step": done, "total": total(state)}
        pending = checkpoint.start_save(
            folder, done, shared, {"parameters": checkpoint.keep_share(state.items())}, keep=2
        )
        del state
        step(engine)  # what is being written must not change
        pending.finish()
        if rank == 0:
            reports.send(done)


def start_ranks(folder: Path, recipe: Recipe) -> tuple[list[Any], Connection]:
    (port,) = free_ports(1)
    reader, writer = FORKSERVER.Pipe(duplex=False)
    ranks = [
        FORKSERVER.Process(target=train_and_save, args=(rank, port, folder, recipe, writer))
        for rank in range(WORLD_SIZE)
    ]
    for process in ranks:
        process.start()
    writer.close()
    return ranks, reader


@pytest.mark.parametrize(
    "engine",
    [
        {"engine.name": "fsdp2"},
        pytest.param({"engine.name": "deepspeed", "engine.deepspeed.config": "zero3"}, marks=pytest.mark.long),
    ],
)
def test_sigkill_at_any_moment_leaves_the_last_finished_save(tmp_path: Path, engine: dict[str, str]) -> None:
    recipe = load_recipe("demo", {"train.global_batch_size": 8, "optim.ema_decay": 0.9, **engine})
    draw = random.Random(engine["engine.name"])
    interrupted = 0
    for number in range(KILLS):
        ranks, reports = start_ranks(tmp_path, recipe)
        reported = [reports.recv()]
        began = time.perf_counter()
        reported.append(reports.recv())
        time.sleep(draw.uniform(0.0, time.perf_counter() - began))  # anywhere between two saves
        while number % 2 and not list(tmp_path.glob(".tmp-*")):
            time.sleep(0.0002)  # and every other kill inside one
        for process in draw.sample(ranks, WORLD_SIZE):
            process.kill()
            time.sleep(draw.choice([0.0, 0.02]))  # in between one rank lives on alone
        for process in ranks:
            process.join()
        reported += rest_of(reports)
        interrupted += was_interrupted(tmp_path)
        shared, saved = checkpoint.load_all_ranks(newest_of_intact(tmp_path))
        assert shared["step"] >= max(reported)
        held = {name: tensors for part in saved for name, tensors in part["parameters"].items()}
        assert total(held) == pytest.approx(shared["total"], rel=1e-9), "training on must not reach what is written"
    assert interrupted >= KILLS // 3, "the kills did not hit saves in progress, so they prove nothing"
