"""The encoders cut into what is gathered, computed and reduced together: each block, and each tower's rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neuclip_scale.config import ModelConfig
from neuclip_scale.models.clip import CLIP, Towers
from neuclip_scale.planning.sharding import planned


@dataclass(frozen=True)
class Unit:
    """A block, or what of a tower is in none: embeddings and projections, which count where the tower begins."""

    tower: Towers
    is_block: bool
    size: int
    """Elements."""
    trained: int
    """Of these, what is trained."""
    forward: float
    """Share of the encoders' forward FLOPs; 1 over all units."""


@lru_cache(maxsize=32)
def encoder_units(section: ModelConfig) -> tuple[Unit, ...]:
    """Units in the order of the forward pass, pictures first; FLOPs by torch's counter on the meta device."""
    model = planned(section, False)
    names = {id(part): name for name, part in model.named_modules()}
    image = set(map(id, model.visual.modules()))
    towers = [[block for block in model.blocks() if (id(block) in image) is first] for first in (True, False)]
    in_blocks = {id(p) for block in model.blocks() for p in block.parameters()}
    own = {id(p) for p in model.visual.parameters()}
    rests = [[p for p in model.parameters() if id(p) not in in_blocks and (id(p) in own) is first]
             for first in (True, False)]  # fmt: skip
    flops, whole = _flops(model)
    of_blocks = [[flops.get(names[id(block)], 0) for block in tower] for tower in towers]
    inside = [flops.get("visual", 0), whole - flops.get("visual", 0)]
    units = []
    names_of: tuple[Towers, Towers] = ("image", "text")
    for tower, blocks, rest, each, all_of_it in zip(names_of, towers, rests, of_blocks, inside, strict=True):
        units.append(_unit(tower, rest, False, max(0, all_of_it - sum(each)) / whole))
        units += [_unit(tower, list(b.parameters()), True, n / whole) for b, n in zip(blocks, each, strict=True)]
    return tuple(units)


def _unit(tower: Towers, parameters: list[nn.Parameter], is_block: bool, forward: float) -> Unit:
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Unit(tower, is_block, sum(p.numel() for p in parameters), trained, forward)


def _flops(model: CLIP) -> tuple[dict[str, int], int]:
    """Forward FLOPs by module name, and in all; by parameters where a tower cannot run on the meta device."""
    root = type(model).__name__
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            images = torch.zeros(2, 3, model.image_size, model.image_size, device="meta")
            model(images, torch.zeros(2, model.context_length, dtype=torch.int64, device="meta"))
        counts = counter.get_flop_counts()
        found = {name.removeprefix(f"{root}."): sum(each.values()) for name, each in counts.items()}
        return found, int(counter.get_total_flops())
    except (NotImplementedError, RuntimeError):
        found = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_modules()}
        return found, found[""]
