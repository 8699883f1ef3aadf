"""How long a collective takes on the links between GPUs, and the networks that nodes can have."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from neuclip_scale.planning.site import Site
from neuclip_scale.planning.traffic import Transfer


@dataclass(frozen=True)
class Interconnect:
    """The network between nodes."""

    told: str
    """For people."""
    node: float
    """Bytes a second that a node sends, by all its cards together."""
    source: str


INTERCONNECTS = {
    "ndr": Interconnect("8 x 400 Gb/s InfiniBand a node", 400e9, 'NVIDIA, data sheet "DGX H100"'),
    "hdr": Interconnect("8 x 200 Gb/s InfiniBand a node", 200e9, 'NVIDIA, data sheet "DGX A100"'),
    "ethernet": Interconnect("one 100 Gb/s Ethernet card a node", 12.5e9, "the line's rate"),
}


def with_interconnect(site: Site, name: str) -> Site:
    """The same nodes on another network, shared by their GPUs."""
    network = INTERCONNECTS[name].node / site.gpus_per_node
    return dataclasses.replace(site, gpu=dataclasses.replace(site.gpu, network=network))


@dataclass(frozen=True)
class LinkTime:
    """Seconds of a collective, all its calls in a step together."""

    sending: float
    """What its bytes take."""
    latency: float
    """What its calls take however little they carry."""

    @property
    def seconds(self) -> float:
        """Both."""
        return self.sending + self.latency


def link_time(transfer: Transfer, site: Site) -> LinkTime:
    """Time of all calls of a collective.

    An all-reduce or broadcast goes along a tree. All-gathers and reduce-scatters over nodes of several GPUs go around a
    ring, each step of which takes a hop: with little to carry, their time is that of the ranks (NCCL's own model,
    `ncclTopoTuneModel` in its graph/tuning.cc).
    """
    assume, ranks = site.assume, transfer.ranks
    if ranks == 1:
        return LinkTime(0.0, 0.0)
    sending = transfer.sent / (site.bandwidth(ranks, transfer.group) * assume.interconnect)
    if transfer.kind in ("all_gather", "reduce_scatter"):
        between = site.nodes_of(ranks, transfer.group) - 1
        call = assume.latency_us + (ranks - 1 - between) * assume.hop_us + between * assume.network_hop_us
    else:
        call = assume.latency_us * math.log2(ranks)
    return LinkTime(sending, transfer.calls * call * 1e-6)


def seconds_of(transfer: Transfer, site: Site) -> float:
    """Seconds of all calls of a collective."""
    return link_time(transfer, site).seconds
