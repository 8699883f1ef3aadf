"""What one machine can be tried for, by `neuclip doctor` and before a job: collectives between processes, worker
memory, arithmetic on a GPU."""

from __future__ import annotations

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

WORKER_TENSOR_BYTES = 32 * 2**20


class ProbeError(RuntimeError):
    """A probe that did not give the right answer in time."""


def all_reduce(backend: str, num_processes: int, seconds: float) -> None:
    """Sum the ranks of `num_processes` new processes over `backend`; raises ProbeError."""
    context: Any = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (backend, num_processes, folder, seconds)
        processes = [context.Process(target=_reduce_one, args=(i, *arguments)) for i in range(num_processes)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(seconds)
            if any(process.exitcode is None for process in processes):
                raise ProbeError(f"no answer within {seconds:.0f} s")
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        answers = [file.read_text("utf-8") for file in sorted(Path(folder).glob("answer*"))]
    expected = str(float(sum(range(num_processes))))
    if answers != [expected] * num_processes:
        raise ProbeError("; ".join(dict.fromkeys(answers)) or "the processes ended without an answer")


def _reduce_one(rank: int, backend: str, num_processes: int, folder: str, seconds: float) -> None:
    try:
        store = dist.FileStore(f"{folder}/store", num_processes)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        timeout = timedelta(seconds=seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_processes, timeout=timeout)
        value = torch.tensor([float(rank)], device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value)
        answer = str(value.item())
        dist.destroy_process_group()
    except Exception as error:  # the parent prints it; a traceback from a child would tear the table
        answer = f"{type(error).__name__}: {error}".splitlines()[0]
    Path(folder, f"answer{rank}").write_text(answer, "utf-8")


class _Ones(Dataset[Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(WORKER_TENSOR_BYTES // 4)


def worker_memory(seconds: float) -> None:
    """Send tensors from two data-loading workers through shared memory; raises if any is lost."""
    for tensor in DataLoader(_Ones(), batch_size=None, num_workers=2, timeout=seconds):
        if float(tensor.sum()) != WORKER_TENSOR_BYTES // 4:
            raise ProbeError("a tensor from a worker arrived damaged")


def gpu_arithmetic(index: int, dtype: torch.dtype) -> None:
    """Multiply on a GPU and compare; raises if the kernel cannot run there or is wrong."""
    ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=dtype)
    if float((ones @ ones).float().mean()) != 64.0:
        raise ProbeError(f"a product of matrices on GPU {index} is wrong")
