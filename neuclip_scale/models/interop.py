"""open_clip's checkpoints in and out of our models, and transformers' in.

Parameter names are the same on both sides (see `models.clip`). What differs is the shape of `logit_scale` and
`logit_bias`: no dimension in open_clip, one here.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.config import ConfigError
from neuclip_scale.models.clip import CLIP, SCALARS
from neuclip_scale.models.hf import HF_NAME, from_hf, read_preset
from neuclip_scale.models.json_configs import checked, read_json
from neuclip_scale.models.misfit import misfits
from neuclip_scale.models.presets import (
    Preset,
    ResNetConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
)

CONFIG_FILE = "open_clip_config.json"
HF_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Settings without a counterpart, at which open_clip leaves a plain CLIP model as it is: its own defaults.
_IN_A_TOWER = {
    **dict.fromkeys(("ls_init_value", "act_kwargs", "norm_kwargs", "block_type"), None),
    **dict.fromkeys(("final_ln_after_pool", "output_tokens", "qk_norm", "scaled_cosine_attn"), False),
    **dict.fromkeys(("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False),
    "mlp_ratio": 4.0,
}
_PLAIN: dict[str, Mapping[str, Any]] = {
    "": {"custom_text": False, "nonscalar_logit_scale": False, "cast_dtype": None, "output_dict": False},
    "vision_cfg.": {
        **_IN_A_TOWER,
        **dict.fromkeys(("attentional_pool", "no_ln_pre"), False),
        "patch_dropout": 0.0,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
    },
    "text_cfg.": {
        **_IN_A_TOWER,
        **dict.fromkeys(("hf_model_name", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"), None),
        **dict.fromkeys(("embed_cls", "no_causal_mask", "proj_bias"), False),
        "pool_type": "argmax",
        "proj_type": "linear",
    },
}
# What these two name has no meaning in a plain model, whatever it is.
_OF_OTHER_MODELS = re.compile("timm_(?!model_name).*|hf_(model_pretrained|.*_type)|attn_pooler_.*|pad_id|eos_id")

_TORCHSCRIPT = (
    "It is TorchScript, as OpenAI's own downloads are: a program, which is not run here. The same weights are on "
    "huggingface.co as safetensors, among them timm/vit_base_patch32_clip_224.openai and openai/clip-vit-base-patch32."
)
_COUNTERS = (torch.int64, torch.bool)
"""Types of what a state dict holds beside weights: numbers of batches, positions, masks."""
# Sizes that OpenAI's archives store beside the parameters, and a mask that older open_clip versions saved.
_NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def to_open_clip_state_dict(model: CLIP) -> dict[str, Tensor]:
    """The model's parameters and buffers under open_clip's names and shapes; sharing their memory."""
    return {
        name: tensor.detach().reshape([]) if name in SCALARS else tensor for name, tensor in model.state_dict().items()
    }


def from_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_open_clip_state_dict`, also for what OpenAI and older versions saved."""
    kept = {name: tensor for name, tensor in state_dict.items() if name not in _NOT_PARAMETERS}
    return {
        name: tensor.reshape(1) if name in SCALARS and tensor.numel() == 1 else tensor for name, tensor in kept.items()
    }


def load_open_clip_state_dict(model: CLIP, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a state dict of open_clip into `model`.

    Every name and shape must match; otherwise `ValueError` lists what is missing, unexpected or of another
    shape and the model is left as it was.
    """
    given = from_open_clip(state_dict)
    wanted = model.state_dict()
    problems = misfits(*({name: tensor.shape for name, tensor in each.items()} for each in (given, wanted)))
    if problems:
        raise ValueError(f"state dict: does not fit the model. {problems} Build the model from the same preset.")
    model.load_state_dict(given)


def read_weights(path: Path) -> tuple[dict[str, Tensor], Preset | None]:
    """Tensors under our names, and the architecture that the JSON beside them tells, if there is one.

    Raises `ConfigError` for an architecture that has no counterpart here, `FileNotFoundError`, `ValueError`.
    """
    weights = find_weights(path)
    state_dict = read_state_dict(weights)
    if HF_NAME in state_dict:
        return from_hf(state_dict), read_preset(weights.parent)
    config = weights.parent / CONFIG_FILE
    found = read_json(config, preset_from_open_clip) if config.is_file() else None
    return from_open_clip(state_dict), found


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a weights file, without the wrappers that training leaves around them.

    Unwraps open_clip's training checkpoints (`state_dict`), DDP (`module.`) and torch.compile (`_orig_mod.`). Raises
    ValueError for a file that holds anything else, `FileNotFoundError`.
    """
    try:
        content = _load(path)
    except Exception as error:  # of many kinds, and torch's advice to turn weights_only off must not reach the user
        if isinstance(error, FileNotFoundError):
            raise
        kind = type(error).__name__
        told = f"{path}: holds no plain tensors that weights_only=True would read ({kind})"
        raise ValueError(f"{told}. {_TORCHSCRIPT}" if _has_code(path) else told) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not (isinstance(content, Mapping) and content):
        raise ValueError(f"{path}: not names with a tensor each, as a state dict has")
    for name, each in content.items():
        if not (isinstance(name, str) and isinstance(each, Tensor)):
            raise ValueError(f"{path}: not names with a tensor each, as a state dict has")
        if each.layout != torch.strided or not (each.is_floating_point() or each.dtype in _COUNTERS):
            # Copied into a parameter, the codes of quantised weights would pass for weights.
            raise ValueError(f"{path}: {name} is {each.dtype}, {each.layout}: give plain weights, not quantised ones")
    return {name.removeprefix("module.").replace("_orig_mod.", ""): tensor for name, tensor in content.items()}


def _has_code(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def preset_from_open_clip(config: Mapping[str, Any]) -> Preset:
    """The architecture in open_clip's JSON, either a hub folder's or one of its `model_configs`.

    Raises `ConfigError` for a setting that has no counterpart here: a model that would run but compute
    something else is not built.
    """
    model = dict(config.get("model_cfg", config))
    preprocess = config.get("preprocess_cfg", {})
    for key, ours in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if preprocess.get(key, ours) != ours:
            problem = f"pictures are brought to size otherwise here ({ours})"
            raise ConfigError(f"preprocess_cfg.{key}", preprocess[key], problem, "Use a model that was trained so.")
    statistics = {f"image_{key}": tuple(preprocess[key]) for key in ("mean", "std") if key in preprocess}
    for scalar in ("init_logit_scale", "init_logit_bias"):  # the weights hold what became of them
        model.pop(scalar, None)
    vision, text = dict(model.pop("vision_cfg")), dict(model.pop("text_cfg"))
    preset = Preset(
        embed_dim=model.pop("embed_dim"),
        quick_gelu=model.pop("quick_gelu", False),
        image_size=vision.pop("image_size", 224),
        image=_image_config(vision),
        text=TextTransformerConfig(
            width=text.pop("width", 512),
            layers=text.pop("layers", 12),
            heads=text.pop("heads", 8),
            context_length=text.pop("context_length", 77),
            vocab_size=text.pop("vocab_size", 49408),
        ),
        **statistics,
    )
    for section, rest in (("", model), ("vision_cfg.", vision), ("text_cfg.", text)):
        for key, value in rest.items():
            if _OF_OTHER_MODELS.fullmatch(key) or (key in _PLAIN[section] and value == _PLAIN[section][key]):
                continue
            raise ConfigError(
                f"{section}{key}", value, "this open_clip setting is not supported", "Use a plain CLIP model."
            )
    return checked(preset)


def _image_config(vision: dict[str, Any]) -> VisionTransformerConfig | ResNetConfig:
    """Takes what it understands out of `vision`."""
    layers, width = vision.pop("layers", 12), vision.pop("width", 768)
    head_width, patch_size = vision.pop("head_width", 64), vision.pop("patch_size", 16)
    if isinstance(layers, int):
        return VisionTransformerConfig(patch_size=patch_size, width=width, layers=layers, heads=width // head_width)
    first, second, third, fourth = layers
    return ResNetConfig(width=width, blocks=(first, second, third, fourth), heads=width * 32 // head_width)


def find_weights(path: Path) -> Path:
    """The weights file at `path` or in the folder `path`; raises `FileNotFoundError`."""
    if path.is_file():
        return path
    for name in (*WEIGHT_FILES, *HF_FILES):
        if (path / name).is_file():
            return path / name
    names = f"{', '.join(WEIGHT_FILES)} or {' or '.join(HF_FILES)}"
    raise FileNotFoundError(f"{path}: neither a weights file nor a folder with {names}.")
