"""How long a collective takes on the links between GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from neuclip_scale.planning.site import Site
from neuclip_scale.planning.traffic import Transfer


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
    `ncclTopoTuneModel` in its graph/tuning.cc). So does an all-to-all's, which has a message for every rank.
    """
    assume, ranks = site.assume, transfer.ranks
    if ranks == 1:
        return LinkTime(0.0, 0.0)
    sending = transfer.sent / (site.bandwidth(ranks, transfer.group) * assume.interconnect)
    if transfer.kind in ("all_gather", "all_to_all", "reduce_scatter"):
        between = site.nodes_of(ranks, transfer.group) - 1
        call = assume.latency_us + (ranks - 1 - between) * assume.hop_us + between * assume.network_hop_us
    else:
        call = assume.latency_us * math.log2(ranks)
    return LinkTime(sending, transfer.calls * call * 1e-6)


def seconds_of(transfer: Transfer, site: Site) -> float:
    """Seconds of all calls of a collective."""
    return link_time(transfer, site).seconds
