"""Process groups from torchrun or srun, and the few collectives the training step needs.

Every function here works without a process group as the single-process case, so callers never branch on it.
Functions that communicate say so; they must be called by every rank.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from neuclip_scale.config import ConfigError
from neuclip_scale.sections import section

T = TypeVar("T")

COMMUNICATION = "communication"
"""Section of the collectives in a step, waiting for slower ranks included; not the encoders' gradients, which engines
send during the backward pass."""


@dataclass(frozen=True)
class Launch:
    """Where this process stands among its peers, as the launcher told it."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    """`torchrun`, `srun` or `single`."""


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else srun's, else a single process. No communication."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        return Launch(rank, world, int(environ.get("LOCAL_RANK", 0)), "torchrun")
    # SLURM_STEP_ID is set inside srun only: a batch script's own shell sees SLURM_NTASKS but is one process. So is the
    # shell of salloc where it is a step, with the job's SLURM_NTASKS.
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks > 1:
        return Launch(int(environ["SLURM_PROCID"]), tasks, int(environ.get("SLURM_LOCALID", 0)), "srun")
    return Launch(0, 1, 0, "single")


def initialize(device: str = "auto", timeout_minutes: float = 30.0, host_tensors: bool = False) -> torch.device:
    """Join the process group the launcher describes (collective) and return this rank's device.

    `device` is auto, cpu or cuda. Uses NCCL for GPUs and gloo for CPUs; with `host_tensors` a GPU's group takes tensors
    in the host's memory too. Raises ConfigError if cuda is asked for and absent, or if there are more ranks than GPUs
    on this node.
    """
    launch = read_launch()
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device", device, "torch sees no GPU", "Run `neuclip doctor`, or use engine.device=cpu."
        )
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = launch.local_rank
    if use_cuda and launch.launcher == "srun" and torch.cuda.device_count() == 1:
        local_rank = 0  # --gpus-per-task=1 shows each task its own GPU only
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "engine.device",
            device,
            f"this is local rank {launch.local_rank}, but the node has {torch.cuda.device_count()} GPU(s)",
            "Start one process per GPU, or use engine.device=cpu.",
        )
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    if launch.world_size > 1 and not dist.is_initialized():
        if launch.launcher == "srun":
            _export_rendezvous(launch)
        dist.init_process_group(
            _backend(where, host_tensors=host_tensors),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=where if use_cuda else None,
        )
    return where


def ensure_process_group(device: torch.device, *, host_tensors: bool = False) -> None:
    """Give a single process a group of its own: sharding libraries want one. No communication."""
    if not dist.is_initialized():
        backend = _backend(device, host_tensors=host_tensors)
        index = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=index)


def _backend(device: torch.device, *, host_tensors: bool) -> str:
    """In torch's words. NCCL knows GPUs' memory alone: a norm or a parameter of what FSDP2 offloads needs gloo."""
    if device.type != "cuda":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if host_tensors else "nccl"


def _export_rendezvous(launch: Launch) -> None:
    """Give torch the address of the first node of this step of a Slurm job, and a port that keeps steps apart."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        try:
            hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:  # as in a container
            problem = f"is not set, and scontrol does not tell the first of the nodes {nodes} ({error})"
            raise ConfigError("MASTER_ADDR", "", problem, "Export the first node's name before srun.") from error
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    # Below 32768, where Linux begins to give ports to outgoing connections.
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + (31 * job + step) % 12000))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank(status: int) -> None:
    """End this process with `status` if a launcher started it as one of several ranks; else do nothing.

    Once DDP was used, the threads of gloo outlive `destroy_process_group` (seen on torch 2.14.1). An abort of rank 0
    (SIGABRT) at its end, seen once in CI, is thought to be the interpreter's teardown meeting one of them; a launcher
    reports such a job as failed although its work is done. So a rank flushes what it has printed and leaves without
    that teardown. Files must be closed by now.
    """
    if read_launch().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks (collective)."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate `rows` [b, ...] of all ranks in rank order -> [B, ...] without a graph (collective).

    Every rank must bring the same shape, as the loaders here guarantee.
    """
    if world_size() == 1:
        return rows.detach()
    with section(COMMUNICATION):
        rows = rows.detach().contiguous()
        gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        _gather_single(gathered, rows)
    return gathered


@torch.no_grad()
def exchange_rows(rows: Tensor) -> Tensor:
    """Of `rows` [B, ...], what every rank has for all ranks' rows, those of this rank -> [W, b, ...] (collective)."""
    if world_size() == 1:
        return rows.detach()[None]
    with section(COMMUNICATION):
        rows = rows.detach().contiguous()
        exchanged = torch.empty_like(rows)
        dist.all_to_all_single(exchanged, rows)
    return exchanged.unflatten(0, (world_size(), -1))


class RowGathering:
    """What `all_gather_rows` gives for rows that become known part by part: each part travels while the next is made.

    No part waits for the other ranks but the one after the next, and no second copy of [B, ...] is held. Every rank
    must add parts of the same sizes in the same order.
    """

    def __init__(self, num_rows: int) -> None:
        """For `num_rows` b of each rank."""
        self._num_rows, self._added = num_rows, 0
        self._world: Tensor | None = None  # [W, b, ...]
        self._travelling: tuple[Any, Tensor, Tensor, slice] | None = None

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Send off the next rows [k, ...] (collective); waits until the part before has arrived."""
        if world_size() == 1:
            return
        with section(COMMUNICATION):
            self._arrive()
            rows = rows.detach().contiguous()
            place = slice(self._added, self._added + len(rows))
            self._added = place.stop
            arriving = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
            work = _gather_single(arriving, rows, async_op=True)
            self._travelling = work, rows, arriving, place  # kept alive until they are there

    @torch.no_grad()
    def result(self, rows: Tensor) -> Tensor:
        """All ranks' rows [B, ...], given this rank's [b, ...], which a single process gets back."""
        if world_size() == 1:
            return rows
        with section(COMMUNICATION):
            self._arrive()
        assert self._world is not None
        assert self._added == self._num_rows, "rows are missing"
        return self._world.flatten(0, 1)

    def _arrive(self) -> None:
        if self._travelling is None:
            return
        work, _, arriving, place = self._travelling
        self._travelling = None
        work.wait()
        arriving = arriving.unflatten(0, (world_size(), -1))
        if arriving.shape[1] == self._num_rows:
            self._world = arriving
            return
        if self._world is None:
            self._world = arriving.new_empty((world_size(), self._num_rows, *arriving.shape[2:]))
        self._world[:, place] = arriving


# torch 2.14 renamed it and warns of the old name, at every rank and in every run.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def pass_on(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Send tensors to the next rank of a ring and receive as many from the one before (collective).

    Gives a function that waits and returns those received; until then the tensors sent must stay as they are.
    """
    following, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    received = [torch.empty_like(tensor) for tensor in tensors]
    operations = [dist.P2POp(dist.isend, tensor, following, tag=tag) for tag, tensor in enumerate(tensors)]
    operations += [dist.P2POp(dist.irecv, tensor, before, tag=tag) for tag, tensor in enumerate(received)]
    works = dist.batch_isend_irecv(operations)

    def arrived() -> list[Tensor]:
        with section(COMMUNICATION):
            for work in works:
                work.wait()
        operations.clear()
        return received

    return arrived


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks in place and return it (collective)."""
    if world_size() > 1:
        with section(COMMUNICATION):
            dist.all_reduce(tensor)
    return tensor


def start_all_reduce_sum(tensor: Tensor) -> Callable[[], None]:
    """Begin to sum `tensor` over ranks in place; call what is returned before it is read (both collective)."""
    if world_size() == 1:
        return lambda: None
    with section(COMMUNICATION):
        work = dist.all_reduce(tensor, async_op=True)

    def finish() -> None:
        with section(COMMUNICATION):
            work.wait()

    return finish


@torch.no_grad()
def broadcast_from_main(tensor: Tensor) -> None:
    """Overwrite `tensor` with rank 0's (collective)."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def seed_everything(seed: int, offset: int = 0) -> None:
    """Seed Python, NumPy and torch; `offset` (the rank, say) makes streams differ where they should."""
    random.seed(seed + offset)
    np.random.seed((seed + offset) % 2**32)
    torch.manual_seed(seed + offset)


def on_main(action: Callable[[], T], *, with_all: bool = False) -> T:
    """Run `action` on rank 0 and give every rank its result (collective); an error there is raised on every rank.

    `with_all`: the action holds collectives, so every rank runs it, and only rank 0's result counts. The result
    travels pickled between the ranks of this run.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if is_main() or with_all:
        try:
            outcome[0] = action()
        except Exception as error:  # must reach the other ranks, or they wait for ever
            outcome[1], own = _that_travels(error), error
    dist.broadcast_object_list(outcome, src=0)
    if is_main() and own is not None:
        raise own
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def _that_travels(error: Exception) -> Exception:
    """`error` if pickle gives it back, else its words: those of other libraries may hold sockets, or lack arguments."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather_objects(value: T) -> list[T]:
    """`value` of every rank in rank order (collective); for small things outside the hot path."""
    gathered: list[Any] = [value]
    if world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, value)
    return gathered
