"""Which layer of which tower a parameter belongs to: for locked towers and for learning rates that fall with depth."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from neuclip_scale.config import ConfigError
from neuclip_scale.models.clip import CLIP, SCALARS
from neuclip_scale.models.timm_library import import_timm
from neuclip_scale.models.vision import TimmTower

TowerName = Literal["image", "text"]

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks?|layers?|h)\.(\d+)\.")
_RESNET_STAGE = re.compile(r"^layer(\d)\.")
_LAST = ("ln_post", "proj", "attnpool", "ln_final", "text_projection")
# Last norms of transformers' encoders, by the names before their weight: T5's and CLIP's, GPT-2's, ModernBERT's.
_LAST_OF_ENCODER = re.compile(r"^transformer\.(?:text_model\.)?(?:final_layer_norm|ln_f|final_norm|norm)\.\w+$")


class Layer(NamedTuple):
    """A parameter's place: 0 are the embeddings, `last` the final norm and the projection."""

    tower: TowerName
    number: int
    last: int


def parameter_layers(model: CLIP) -> dict[str, Layer]:
    """Every parameter of the towers by name; logit_scale and logit_bias are in none."""
    towers: dict[TowerName, dict[str, int | None]] = {"image": {}, "text": {}}
    for name, _ in model.named_parameters():
        if name not in SCALARS:
            tower: TowerName = "image" if name.startswith("visual.") else "text"
            towers[tower][name] = _number(name.removeprefix("visual.").removeprefix("text."))
    if isinstance(model.visual, TimmTower):
        towers["image"] |= _timm_numbers(model.visual)
    found: dict[str, Layer] = {}
    for tower, numbers in towers.items():
        last = 1 + max((number for number in numbers.values() if number is not None), default=0)
        found |= {name: Layer(tower, last if number is None else number, last) for name, number in numbers.items()}
    return found


def _number(name: str) -> int | None:
    """Number of the layer; None for the last, whatever number that has."""
    match = _BLOCK.search(name)
    if match:
        return int(match[1]) + 1
    stage = _RESNET_STAGE.match(name)
    if stage:
        return int(stage[1])
    return None if name.split(".")[0] in _LAST or _LAST_OF_ENCODER.match(name) else 0


def _timm_numbers(tower: TimmTower) -> dict[str, int | None]:
    """timm's own grouping; it knows each architecture's order."""
    models = import_timm("model.image_tower").models
    groups = models.group_parameters(tower.trunk, tower.trunk.group_matcher(coarse=False), reverse=True)
    numbers: dict[str, int | None] = {f"visual.trunk.{name}": int(group) for name, group in groups.items()}
    return numbers | {f"visual.head.{name}": None for name, _ in tower.head.named_parameters()}


def lock_tower(model: CLIP, tower: TowerName, unlocked_layers: int) -> None:
    """Let a tower's parameters stay as they are, but for its last `unlocked_layers` layers (the projection is one).

    A tower locked whole stays in evaluation mode: its dropout and batch statistics rest too (LiT, arXiv 2111.07991).
    Raises ConfigError if that leaves nothing locked.
    """
    layers = {name: layer for name, layer in parameter_layers(model).items() if layer.tower == tower}
    last = max(layer.last for layer in layers.values())
    if unlocked_layers > last:
        problem = (
            f"the {tower} tower has {last + 1} layers, embeddings and projection included: all of them would train"
        )
        remedy = f"Give at most {last}, or leave out model.lock."
        raise ConfigError("model.unlocked_layers", unlocked_layers, problem, remedy)
    for name, layer in layers.items():
        if layer.number <= last - unlocked_layers:
            model.get_parameter(name).requires_grad_(False)
    if unlocked_layers == 0:
        model.at_rest = tower
        model.train(model.training)
