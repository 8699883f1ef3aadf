"""Weights that a run starts from: whole models or one tower, from open_clip's or transformers' files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from neuclip_scale.config import ConfigError, ModelConfig
from neuclip_scale.models.clip import CLIP, SCALARS
from neuclip_scale.models.interop import find_weights, from_open_clip, read_state_dict, read_weights
from neuclip_scale.models.misfit import misfits
from neuclip_scale.models.presets import Preset, differences, preset_of
from neuclip_scale.models.timm_library import import_timm

FIELD = "model.pretrained"
_POSITIONS = "visual.positional_embedding"


def pretrained_values(config: ModelConfig, model: CLIP) -> dict[str, Tensor]:
    """Parameters and buffers of `model` that start from `config.pretrained`, by name; empty where nothing does.

    Image positions are resampled to another resolution. Raises `ConfigError` where the architecture is another one:
    also in what shapes do not show, heads and activation.
    """
    if not config.pretrained:
        return {}
    values, found = _read(Path(config.pretrained), own_towers=not (config.image_tower or config.text_tower))
    if found is not None:
        _check_architecture(config, found)
    both = config.pretrained_towers == "both"
    towers = {"image", "text"} if both else {config.pretrained_towers}
    have = model.state_dict()
    scalars = {name: values[name] for name in SCALARS if both and name in values and name in have}
    wanted = {name: tensor for name, tensor in have.items() if _tower(name) in towers}
    values = {name: tensor for name, tensor in values.items() if _tower(name) in towers}
    if _POSITIONS in wanted and _POSITIONS in values:
        values[_POSITIONS] = _resampled(values[_POSITIONS], len(wanted[_POSITIONS]))
    problems = misfits(*({name: tensor.shape for name, tensor in each.items()} for each in (values, wanted)))
    if problems:
        remedy = "Choose the model.preset they were trained with, or model.pretrained_towers for the tower that fits."
        raise ConfigError(FIELD, config.pretrained, f"the weights do not fit the model. {problems}".rstrip("."), remedy)
    return values | scalars


def _tower(name: str) -> str:
    return "neither" if name in SCALARS else "image" if name.startswith("visual.") else "text"


def _read(path: Path, *, own_towers: bool) -> tuple[dict[str, Tensor], Preset | None]:
    """The tensors under our names, and the architecture where a file beside them tells it."""
    try:
        if own_towers:
            return read_weights(path)
        # What open_clip says of another library's tower has no counterpart here: names and shapes must do.
        return from_open_clip(read_state_dict(find_weights(path))), None
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            FIELD,
            str(path),
            f"cannot be read ({str(error).rstrip('.')})",
            "Give a folder or weights file of open_clip or of transformers' CLIPModel; `neuclip export` writes both.",
        ) from error


def _check_architecture(config: ModelConfig, found: Preset) -> None:
    towers = ("image", "text") if config.pretrained_towers == "both" else (config.pretrained_towers,)
    different = differences(found, preset_of(config), towers)
    if different:
        raise ConfigError(
            FIELD,
            config.pretrained,
            f"the weights are of another architecture than model.preset = {config.preset} ({'; '.join(different)})",
            "Choose the preset they were trained with; OpenAI's have the suffix -quickgelu.",
        )


def _resampled(positions: Tensor, wanted: int) -> Tensor:
    """ViT positions [1 + grid^2, width] for another grid, by bicubic interpolation; what is none of that, as it is."""
    if positions.ndim != 2 or len(positions) in (0, wanted):
        return positions
    if math.isqrt(len(positions) - 1) ** 2 != len(positions) - 1:
        return positions
    size = round((wanted - 1) ** 0.5)
    resample = import_timm("model.pretrained at another resolution").layers.resample_abs_pos_embed
    resampled: Tensor = resample(positions[None].to(torch.float32), [size, size], num_prefix_tokens=1)[0]
    return resampled
