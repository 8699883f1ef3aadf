"""Runs a function on real gloo ranks, each a process of its own.

Each is forked from a server (`forking`), and ends without the interpreter's teardown (see `distributed.end_rank`).
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from forking import preload_training
from ports import free_ports

preload_training()


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new gloo group; returns what each rank returned."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank,
            args=(world_size, port, folder, function, arguments),
            nprocs=world_size,
            join=True,
            start_method="forkserver",
        )
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from neuclip_scale import distributed

    distributed.initialize("cpu")
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*arguments)))
    distributed.shutdown()
