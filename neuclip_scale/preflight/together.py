"""What ranks find out together: whether they reach each other, how fast, and whether their clocks agree."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

WARM_UP, REPEATS = 2, 5
GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20


def absent_ranks(store: dist.Store, rank: int, world_size: int, seconds: float) -> list[int]:
    """Say that this rank is there, and return those that have not said so within `seconds`.

    No collective: a rank that does not come leaves none waiting. Any number of ranks may ask.
    """
    store.set(f"preflight/here/{rank}", "1")
    deadline = time.monotonic() + seconds
    while True:
        absent = [other for other in range(world_size) if not store.check([f"preflight/here/{other}"])]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.1)


def clock_offsets(group: dist.ProcessGroup | None = None) -> list[float]:
    """Seconds by which each rank's clock is ahead of the median (collective); exact to the length of a barrier."""
    dist.barrier(group)
    clocks: list[float | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(clocks, time.time(), group)
    read = [clock for clock in clocks if clock is not None]
    median = sorted(read)[len(read) // 2]
    return [clock - median for clock in read]


def all_reduce_rate(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Bus bandwidth of an all-reduce in GB/s, as nccl-tests reckon it (collective in `group`).

    2 (n - 1) / n bytes pass each rank for every byte that is reduced, whatever n is.
    """
    size = dist.get_world_size(group)
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    tensor = torch.ones(num_bytes // 4, device=device)
    for repeats in (WARM_UP, REPEATS):
        tensor.fill_(1.0 / size)
        dist.barrier(group)
        began = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor, group=group)
            tensor /= size  # or it would grow with each
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - began) / repeats
    expected = 1.0 / size
    if not torch.allclose(tensor, torch.full_like(tensor, expected), rtol=1e-3):
        raise RuntimeError(f"the sum over {size} ranks is wrong: {float(tensor[0])} instead of {expected}")
    return 2 * (size - 1) / size * num_bytes / seconds / 1e9


def own_node_group(ranks_per_node: int) -> dist.ProcessGroup:
    """The group of the ranks of this rank's node (collective)."""
    firsts = range(0, dist.get_world_size(), ranks_per_node)
    groups = [dist.new_group(list(range(first, first + ranks_per_node))) for first in firsts]
    group = groups[dist.get_rank() // ranks_per_node]
    assert isinstance(group, dist.ProcessGroup)
    return group


def neighbour_rates(device: torch.device, ranks_per_node: int, seconds: float) -> dict[tuple[int, int], float]:
    """GB/s between the first ranks of every two neighbouring nodes, in a ring, on rank 0 of each (collective).

    Every rank returns the rates of the pairs it belongs to.
    """
    firsts = list(range(0, dist.get_world_size(), ranks_per_node))
    pairs = [(node, (node + 1) % len(firsts)) for node in range(len(firsts) if len(firsts) > 2 else len(firsts) - 1)]
    found = {}
    for pair in pairs:
        group = dist.new_group([firsts[node] for node in sorted(pair)], timeout=timedelta(seconds=seconds))
        if isinstance(group, dist.ProcessGroup):  # for those that are not in it, it is a number
            found[pair] = all_reduce_rate(device, group)
        dist.barrier()
    return found
