"""Names and shapes of CLIP's parameters in transformers' CLIPModel, there and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.config import ConfigError
from neuclip_scale.models.json_configs import checked, read_json
from neuclip_scale.models.presets import Preset, TextTransformerConfig, VisionTransformerConfig

HF_NAME = "text_model.embeddings.token_embedding.weight"
"""A name by which such a state dict is known."""
_TOWERS = {"text_model": "", "vision_model": "visual."}
"""Prefix in transformers -> prefix here."""
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_REST = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    HF_NAME: "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelt so in transformers
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_NORM_EPS = 1e-5
_PICTURES = {"resample": 3, "do_resize": True, "do_center_crop": True, "do_normalize": True, "do_rescale": True}
"""What CLIP's image processor does; 3 is bicubic."""
_RESCALE = 1 / 255
_TRANSPOSED = ("text_projection", "visual.proj")
_IN_A_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def to_hf(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a CLIP state dict under transformers' name and in its shape."""
    for theirs, ours in _REST.items():
        tensor = state[ours]
        yield theirs, tensor.reshape([]) if ours == "logit_scale" else tensor.T if ours in _TRANSPOSED else tensor
    for tower, prefix in _TOWERS.items():
        blocks = f"{prefix}transformer.resblocks."
        for number in sorted({int(name[len(blocks) :].split(".")[0]) for name in state if name.startswith(blocks)}):
            target = f"{tower}.encoder.layers.{number}"
            for part in ("weight", "bias"):
                for theirs, ours in _BLOCK.items():
                    yield f"{target}.{theirs}.{part}", state[f"{blocks}{number}.{ours}.{part}"]
                joint = state[f"{blocks}{number}.attn.in_proj_{part}"]
                for matrix, rows in zip("qkv", joint.chunk(3), strict=True):
                    yield f"{target}.self_attn.{matrix}_proj.{part}", rows


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_hf`; what CLIPModel's state dict holds beside parameters is left out."""
    found: dict[str, Tensor] = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _IN_A_BLOCK.fullmatch(name)
        if match:
            tower, number, theirs, part = match.groups()
            block = f"{_TOWERS[tower]}transformer.resblocks.{number}"
            if theirs in _BLOCK:
                found[f"{block}.{_BLOCK[theirs]}.{part}"] = tensor
            else:
                joint.setdefault(f"{block}.attn.in_proj_{part}", {})[theirs] = tensor
        elif name in _REST:
            ours = _REST[name]
            one = ours == "logit_scale" and tensor.numel() == 1
            found[ours] = tensor.reshape(1) if one else tensor.T if ours in _TRANSPOSED else tensor
    for ours, parts in joint.items():
        found[ours] = torch.cat([parts[f"self_attn.{matrix}_proj"] for matrix in "qkv"])
    return found


def read_preset(folder: Path) -> Preset | None:
    """The architecture of a folder as transformers saves it, None if there is no config.json."""
    config, processor = folder / "config.json", folder / "preprocessor_config.json"
    if not config.is_file():
        return None
    preset = read_json(config, preset_from_hf)

    def with_statistics(found: Mapping[str, Any]) -> Preset:
        return checked(dataclasses.replace(preset, **_statistics(found, preset.image_size)))

    if processor.is_file():
        return read_json(processor, with_statistics)
    if (folder / "processor_config.json").is_file():  # since transformers 5
        return read_json(
            folder / "processor_config.json", lambda found: with_statistics(found.get("image_processor", {}))
        )
    return preset


def preset_from_hf(config: Mapping[str, dict[str, object]]) -> Preset:
    """The architecture in the config.json of a CLIPModel.

    Raises `ConfigError` for a setting that has no counterpart here: a model that would run but compute something else
    is not built.
    """
    text, vision = config["text_config"], config["vision_config"]
    # transformers' own default is OpenAI's.
    activation = text.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu") or vision.get("hidden_act", "quick_gelu") != activation:
        both = f"{activation} and {vision.get('hidden_act', 'quick_gelu')}"
        problem = "both towers have gelu or both quick_gelu here"
        raise ConfigError("text_config.hidden_act", both, problem, "Use another model.")

    for name, section in (("text_config", text), ("vision_config", vision)):
        eps = section.get("layer_norm_eps", _NORM_EPS)
        if eps != _NORM_EPS:
            problem = f"norms add {_NORM_EPS} to the variance here"
            raise ConfigError(f"{name}.layer_norm_eps", eps, problem, "Use another model.")

    def size(section: Mapping[str, object], name: str, default: int) -> int:
        return int(section.get(name, default))  # type: ignore[call-overload, no-any-return]

    preset = Preset(
        embed_dim=size(config, "projection_dim", 512),
        image=VisionTransformerConfig(
            patch_size=size(vision, "patch_size", 32),
            width=size(vision, "hidden_size", 768),
            layers=size(vision, "num_hidden_layers", 12),
            heads=size(vision, "num_attention_heads", 12),
        ),
        text=TextTransformerConfig(
            width=size(text, "hidden_size", 512),
            layers=size(text, "num_hidden_layers", 12),
            heads=size(text, "num_attention_heads", 8),
            context_length=size(text, "max_position_embeddings", 77),
            vocab_size=size(text, "vocab_size", 49408),
        ),
        image_size=size(vision, "image_size", 224),
        quick_gelu=activation == "quick_gelu",
    )
    return checked(preset)


def _statistics(processor: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Mean and standard deviation of the channels; refuses pictures that are made ready otherwise."""
    for key, ours in _PICTURES.items():
        given = processor.get(key, ours)
        if given is not None and given != ours:
            problem = f"pictures are made ready otherwise here ({ours})"
            raise ConfigError(f"preprocessor_config.{key}", given, problem, "Use a model that was trained so.")
    edges = processor.get("size")
    if isinstance(edges, Mapping) and "shortest_edge" not in edges:
        problem = "the shorter edge is brought to size here"
        raise ConfigError("preprocessor_config.size", dict(edges), problem, "Use a model that was trained so.")
    for key in ("size", "crop_size"):
        given = processor.get(key) or image_size  # a number in older files
        if {*given.values()} != {image_size} if isinstance(given, Mapping) else given != image_size:
            problem = f"a picture's shorter edge is brought to the model's {image_size} pixels here, and no more is cut"
            raise ConfigError(f"preprocessor_config.{key}", given, problem, "Use a model that was trained so.")
    factor = processor.get("rescale_factor") or _RESCALE
    if abs(factor - _RESCALE) > 1e-6:
        problem = "values from 0 to 255 become 0 to 1 here"
        raise ConfigError("preprocessor_config.rescale_factor", factor, problem, "Use a model that was trained so.")
    keys = ("image_mean", "image_std")
    return {key: tuple(processor[key]) for key in keys if processor.get(key) is not None}
