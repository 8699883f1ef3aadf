"""Where a run is to be, and what is assumed about it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from neuclip_scale.config import ConfigError

if TYPE_CHECKING:
    from neuclip_scale.planning.gpus import GpuType


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the roofline takes for granted. Compare with a run's summary.json and give better ones."""

    compute: float = 0.4
    """Share of the GPU's peak at which the encoders' products run."""
    caption_tokens: float = 0.0
    """Mean tokens of a packed caption (`packed_tokens` in metrics.jsonl); 0: captions as long as the context. Memory is
    that of whole contexts."""
    objective_compute: float = 0.4
    """Share at which those of similarities run of the peak of their precision (train.matmul_precision): bf16's, half of
    it for TF32, a sixth for 3xTF32."""
    npn_compute: float = 0.15
    """Share of the bf16 peak at which the NPN runs with factors in bf16; in TF32 it takes 1.14, in 3xTF32 2.3 times as
    long."""
    npn_launch_us: float = 58.0
    """Least microseconds of each of the NPN's kernels, 84 of them with ten updates: the host starts no more."""
    memory: float = 0.7
    """Share of its memory bandwidth that element-wise work reaches."""
    interconnect: float = 0.7
    """Share of NVLink's and the network's bandwidth that collectives reach."""
    latency_us: float = 15.0
    """Microseconds of each collective; of all-reduces times log2 of the ranks."""
    hop_us: float = 1.9
    """Microseconds of each step around a ring inside a node (all-gathers, reduce-scatters); NCCL's constant."""
    network_hop_us: float = 4.0
    """The same from node to node."""
    operation_us: float = 5.0
    """Least microseconds of each of the encoders' operations, what the host takes to start it: tiny batches wait."""
    overhead: float = 0.05
    """Time beside the steps: checkpoints, evaluation, restarts, waiting for data; a share of the steps'."""
    power: float = 0.85
    """Share of the board's maximum power that training draws."""
    node_watts_per_gpu: float = 300.0
    """Power of the rest of a node, for each of its GPUs: processors, memory, fans, network."""
    pue: float = 1.2
    """Power of the building over that of its machines."""
    host_gib: float = 1024.0
    """Memory of a node."""
    host_bandwidth: float = 200e9
    """Bytes a second that a node's processors move in its memory, for offloaded optimizers."""
    sample_kb: float = 35.0
    """Size of a pair in its shard, in 1000 bytes. Pictures of 224 pixels take less, originals more."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Speeds of one device that somebody measured, in place of assumed ones; None: assumed."""

    encoders: float | None = None
    """FLOP/s of the encoders as they are run."""
    objective: float | None = None
    """FLOP/s of similarities, and of normalizers that are no NPN."""
    normalizer: float | None = None
    """FLOP/s of the NPN's updates and predictions (`NeuCLIP.estimate_flops`)."""
    normalizer_precision: str = ""
    """torch's precision of fp32 products there; empty where it is not told, and then taken for the recipe's."""
    update: float | None = None
    """Seconds of the optimizer for each trained element that a rank updates."""
    caption_tokens: float | None = None
    """Mean tokens of the captions as they were packed."""
    told: tuple[str, ...] = ()
    """What was measured, on what, in which file; for people."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The machines of a run."""

    gpu: GpuType
    world_size: int
    gpus_per_node: int = 8
    dataset_size: int = 0
    """Pairs of the data set; 0 where it is not known."""
    price: float = 0.0
    """Of a GPU for an hour; 0: not given."""
    egress_price: float = 0.0
    """Of 10^9 bytes read from a remote store; 0: not given."""
    assume: Assumptions = field(default_factory=Assumptions)
    measured: Measured = field(default_factory=Measured)

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.world_size // self.gpus_per_node)

    def nodes_of(self, ranks: int, group: str) -> int:
        """Nodes that a ring goes through."""
        if group == "neighbours" and ranks <= self.gpus_per_node:
            return 1
        return ranks if group == "counterparts" else self.nodes

    def bandwidth(self, ranks: int, group: str) -> float:
        """Bytes a second that each rank of a ring sends, before efficiency.

        A ring over nodes leaves each of them once: all the node's cards carry it together. Counterparts on other nodes
        have a card each.
        """
        if self.nodes == 1 or (group == "neighbours" and ranks <= self.gpus_per_node):
            return self.gpu.nvlink
        if group == "counterparts" or self.gpus_per_node == 1:
            return self.gpu.network
        return min(self.gpu.nvlink, self.gpus_per_node * self.gpu.network)


def check_site(nodes: int, gpus_per_node: int, world_size: int) -> int:
    """Ranks of a run on these nodes; raises `ConfigError`."""
    for name, value in {"--nodes": nodes, "--gpus-per-node": gpus_per_node}.items():
        if value < 1:
            raise ConfigError(name, value, "there must be at least one", "Give 1 or more.")
    if world_size < 0:
        raise ConfigError("--world-size", world_size, "no number of ranks", "Leave it out, or give 1 or more.")
    return world_size or nodes * gpus_per_node


def check_assumptions(assume: Assumptions) -> None:
    """Raise `ConfigError` for what nothing can be worked out from."""
    may_be_zero = (
        "caption_tokens",
        "latency_us",
        "hop_us",
        "network_hop_us",
        "operation_us",
        "npn_launch_us",
        "overhead",
        "node_watts_per_gpu",
        "host_gib",
        "sample_kb",
    )
    for name, value in asdict(assume).items():
        if not 0 <= value < math.inf or (value == 0 and name not in may_be_zero):
            raise ConfigError(f"--assume.{name}", value, "must be above zero and finite", "Leave it out, or mend it.")
