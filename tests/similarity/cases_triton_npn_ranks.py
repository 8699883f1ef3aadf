"""Updates of two NPNs over two ranks, whose gradients travel by turns. Run by test_triton.py, in a process of its own.

Ranks share the GPU, so they talk through gloo.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import graphs_on_cpu
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from cases_triton_npn import RATE, TAU, Problem, make
from torch import Tensor
from triton_problems import DEVICE

RANKS, PAIRS, STEPS = 2, 48, 4


def problems() -> list[Problem]:
    """Both networks and their anchors. They are made on the CPU, where Triton cannot be had beside a GPU."""
    return [make(PAIRS, 70, 64), make(PAIRS, 40, 64)]


def trained(sides: list[Problem], rows: slice, *, replays: bool) -> list[Tensor]:
    """Weights of both networks after some steps of `rows` of the batch's pairs."""
    for step in range(STEPS):
        tau = torch.tensor([TAU * (1 + step / 5)], device=DEVICE)
        updates = []
        for npn, anchors, positives, log_g, index in sides:
            npn.replays.enabled = replays
            batch = [each.roll(step, 0)[rows] for each in (anchors, positives, log_g, index) if each is not None]
            updates.append(npn.updates(*batch[:2], tau, *batch[2:], num_updates=3, learning_rate=RATE))
        stops = sum(1 for _ in itertools.zip_longest(*updates))
        assert stops == (3 if dist.is_initialized() or os.environ["NEUCLIP_SIMILARITY"] == "torch" else 0)
    if replays:
        (recording,) = [each for each in sides[0].npn.replays._recordings.values() if each is not None]
        assert len(recording.parts) == (4 if dist.is_initialized() else 1)
    return [side.npn.weight.cpu() for side in sides]


def prepare(monkeypatch: pytest.MonkeyPatch, sides: list[Problem]) -> None:
    """Choose Triton, and what stands for graphs on a CPU."""
    monkeypatch.setenv("NEUCLIP_SIMILARITY", "triton")
    if DEVICE.type == "cpu":
        graphs_on_cpu.take_the_place_of_cuda(monkeypatch, [each for side in sides for each in side.npn.buffers()])


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    both = [(problems(), replays) for replays in (True, False)]
    prepare(pytest.MonkeyPatch(), both[0][0])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = PAIRS // RANKS
    rows = slice(rank * share, (rank + 1) * share)
    torch.save([trained(sides, rows, replays=replays) for sides, replays in both], Path(folder, str(rank)))
    dist.destroy_process_group()


def test_ranks_take_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = problems()
    torch.multiprocessing.start_processes(rank_main, args=(str(tmp_path),), nprocs=RANKS, start_method="spawn")
    prepare(monkeypatch, sides)
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(RANKS)]
    whole = trained(sides, slice(0, PAIRS), replays=True)
    for side, expected in enumerate(whole):
        replayed, single = (each[side] for each in found[0])
        assert torch.equal(replayed, single)
        assert torch.equal(replayed, found[1][0][side])
        torch.testing.assert_close(replayed, expected, rtol=0, atol=1e-4)


def mixed_rank(rank: int, folder: str) -> None:
    """Rank 1 has no Triton."""
    torch.set_num_threads(1)
    sides = problems()
    pytest.MonkeyPatch().setenv("NEUCLIP_SIMILARITY", "torch" if rank == 1 else "triton")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = PAIRS // RANKS
    torch.save(trained(sides, slice(rank * share, (rank + 1) * share), replays=False), Path(folder, str(rank)))
    dist.destroy_process_group()


def test_where_one_rank_must_take_torch_all_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prototypes are replicated: a rank that reduced another gradient than the others would part from them."""
    torch.multiprocessing.start_processes(mixed_rank, args=(str(tmp_path),), nprocs=RANKS, start_method="spawn")
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(RANKS)]
    sides = problems()
    monkeypatch.setenv("NEUCLIP_SIMILARITY", "torch")
    whole = trained(sides, slice(0, PAIRS), replays=False)
    for one, other, expected in zip(*found, whole, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)
