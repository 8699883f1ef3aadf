"""What is varied where a recipe is planned over many sites: numbers of GPUs, engines, networks between nodes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from neuclip_scale.config import ConfigError
from neuclip_scale.planning.site import Site

HYBRID = "fsdp2-hybrid"
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine.name": "ddp"},
    "fsdp2": {"engine.name": "fsdp2", "engine.fsdp.replicas": 1},
    HYBRID: {"engine.name": "fsdp2"},
    "zero1": {"engine.name": "deepspeed", "engine.deepspeed.config": "zero1"},
    "zero2": {"engine.name": "deepspeed", "engine.deepspeed.config": "zero2"},
    "zero3": {"engine.name": "deepspeed", "engine.deepspeed.config": "zero3"},
}
"""Engines by name: replicated; sharded over all GPUs; sharded in a node, replicated over nodes; ZeRO's stages."""


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


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `--scaling` varies."""

    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """With --scaling: numbers of GPUs, rising."""
    engines: tuple[str, ...] = tuple(ENGINES)
    """With --scaling: ddp, fsdp2 (shards over all GPUs), fsdp2-hybrid (in a node), zero1, zero2, zero3."""
    interconnects: tuple[str, ...] = tuple(INTERCONNECTS)
    """With --scaling: ndr (8 x 400 Gb/s a node), hdr (8 x 200 Gb/s), ethernet (one card of 100 Gb/s)."""
    pairs_per_gpu: int = 0
    """With --scaling: pairs of each GPU where the batch grows with their number; 0 takes train.micro_batch_size."""


def with_interconnect(site: Site, name: str) -> Site:
    """The same nodes on another network, shared by their GPUs."""
    network = INTERCONNECTS[name].node / site.gpus_per_node
    return dataclasses.replace(site, gpu=dataclasses.replace(site.gpu, network=network))


def check_sweep(sweep: Sweep) -> None:
    """Raise `ConfigError` for names and numbers that nothing can be planned for."""
    engines, networks = tuple(ENGINES), tuple(INTERCONNECTS)
    for option, given, names in (
        ("--engines", sweep.engines, engines),
        ("--interconnects", sweep.interconnects, networks),
    ):
        wrong = [name for name in given if name not in names]
        if wrong or len(set(given)) != len(given) or not given:
            problem = "not known" if wrong else "must be different names, one at least"
            raise ConfigError(option, wrong[0] if wrong else given, problem, f"Use {', '.join(names)}.")
    if not sweep.gpus or min(sweep.gpus) < 1 or list(sweep.gpus) != sorted(set(sweep.gpus)):
        problem = "must be rising numbers of 1 and more"
        raise ConfigError("--gpus", sweep.gpus, problem, "Give them as --gpus 8 16 32 64.")
    if sweep.pairs_per_gpu < 0:
        raise ConfigError("--pairs-per-gpu", sweep.pairs_per_gpu, "no number of pairs", "Give 1 or more.")
