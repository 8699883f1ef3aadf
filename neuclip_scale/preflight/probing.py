"""One rank's way through all probes."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neuclip_scale import distributed
from neuclip_scale.preflight import probes, together
from neuclip_scale.preflight.judging import LAST, NETWORK
from neuclip_scale.preflight.reports import Report, node_name, to_line


class Speaker:
    """Prints what this rank finds, at once."""

    def __init__(self, rank: int) -> None:
        self.rank, self.node = rank, node_name()

    def say(self, name: str, problem: str = "", detail: str = "", **values: Any) -> None:
        """One report."""
        print(to_line(Report(self.rank, self.node, name, problem, detail, values)), flush=True)

    def try_(self, name: str, probe: Callable[[], probes.Found], **values: Any) -> None:
        """Report what `probe` finds; one that raises has found something too."""
        try:
            problem, detail = probe()
        except Exception as error:  # whatever it is, the judge must hear of it
            problem, detail = f"{type(error).__name__}: {error}".splitlines()[0], ""
        self.say(name, problem, detail, **values)


def probe_all(folder: Path, data: str, device: str, ranks_per_node: int, floor: float, patience: float) -> None:
    """Try everything, in an order in which one that hangs has told of what went before (collective at the end)."""
    launch = distributed.read_launch()
    num_nodes = launch.world_size // ranks_per_node
    speaker = Speaker(launch.rank)
    speaker.say("hello")
    if launch.local_rank == 0:
        speaker.say("versions", **probes.versions())
        speaker.try_("GPU health", probes.gpu_health)
        if data:
            speaker.try_("data", lambda: probes.data(data))
        shared = probes.SharedFolder(folder, launch.rank // ranks_per_node, num_nodes)
        problem, detail = shared.write(speaker.node)
        speaker.say("storage", problem, detail, missing=[] if problem else shared.missing(patience))
    if device != "cpu":
        speaker.try_("GPU", lambda: probes.gpu(launch.local_rank, ranks_per_node))
    if launch.world_size > 1:
        try:
            _probe_together(speaker, launch, ranks_per_node, device, floor, patience)
        except Exception as error:
            speaker.say(NETWORK, f"{type(error).__name__}: {error}".splitlines()[0])
            return
    speaker.say(LAST)


def _probe_together(
    speaker: Speaker, launch: distributed.Launch, ranks_per_node: int, device: str, floor: float, patience: float
) -> None:
    limit = timedelta(seconds=patience)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, launch.world_size, launch.rank == 0, timeout=limit, wait_for_workers=False)
    absent = together.absent_ranks(store, launch.rank, launch.world_size, patience)
    speaker.say("join", absent=absent if launch.rank == 0 else [])
    if absent:
        return
    use_cuda = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", launch.local_rank % torch.cuda.device_count()) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=limit,
    )
    offset = together.clock_offsets()[launch.rank]
    if launch.local_rank == 0:
        speaker.say("clock", offset=offset)
    if 1 < ranks_per_node < launch.world_size:
        rate = together.all_reduce_rate(where, together.own_node_group(ranks_per_node))
        if launch.local_rank == 0:
            speaker.say("all-reduce in a node", detail=f"{rate:.2f} GB/s", rate=rate)
    rate = together.all_reduce_rate(where)
    slow = torch.tensor([rate < floor], dtype=torch.int32)
    dist.all_reduce(slow)  # together, or some would go on without the others
    pairs = together.neighbour_rates(where, ranks_per_node, patience) if slow.item() else {}
    if launch.local_rank == 0:
        named = {f"{first}-{second}": rate for (first, second), rate in pairs.items()}
        speaker.say("all-reduce", detail=f"{rate:.2f} GB/s over {launch.world_size} ranks", rate=rate, pairs=named)
    dist.barrier()
