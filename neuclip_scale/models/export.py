"""Writes a model as other libraries read it: a folder of open_clip, of transformers, or the bare tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from neuclip_scale.config import ConfigError
from neuclip_scale.files import write_json, write_text
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.hf import to_hf
from neuclip_scale.models.interop import CONFIG_FILE, WEIGHT_FILES, to_open_clip_state_dict
from neuclip_scale.models.presets import Preset, ResNetConfig, TextTransformerConfig, VisionTransformerConfig
from neuclip_scale.models.tokenizer import CLIPTokenizer, byte_pair_vocabulary


def save_open_clip(model: CLIP, preset: Preset, folder: Path) -> None:
    """For `open_clip.create_model_from_pretrained("local-dir:FOLDER")`; `preset` is what the model was built from.

    open_clip brings the tokenizer itself: it is CLIP's.
    """
    image, text = preset.image, preset.text
    if isinstance(image, ResNetConfig):
        vision: dict[str, Any] = {"layers": list(image.blocks), "head_width": image.width * 32 // image.heads}
    else:
        vision = {"layers": image.layers, "head_width": image.width // image.heads, "patch_size": image.patch_size}
    config = {
        "embed_dim": preset.embed_dim,
        "quick_gelu": preset.quick_gelu,
        "vision_cfg": {"image_size": model.image_size, "width": image.width, **vision},
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    }
    if model.logit_bias is not None:
        config["init_logit_bias"] = float(model.logit_bias.detach())
    looks = {"mean": list(model.image_mean), "std": list(model.image_std), "interpolation": "bicubic"}
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(to_open_clip_state_dict(model), folder / WEIGHT_FILES[0])
    write_json(folder / CONFIG_FILE, {"model_cfg": config, "preprocess_cfg": {**looks, "resize_mode": "shortest"}})


def save_hf(model: CLIP, preset: Preset, folder: Path) -> None:
    """For `transformers.CLIPModel.from_pretrained(FOLDER)`, with tokenizer and image processor.

    Raises `ConfigError` for a model that CLIPModel cannot compute: a ResNet, or one with SigLIP's bias.
    """
    if isinstance(preset.image, ResNetConfig):
        raise ConfigError("format", "hf", "transformers' CLIPModel has no ResNet image tower", "Use open_clip.")
    if model.logit_bias is not None:
        raise ConfigError("format", "hf", "transformers' CLIPModel has no bias, which siglip learns", "Use open_clip.")
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(dict(to_hf(model.state_dict())), folder / "model.safetensors")
    write_json(folder / "config.json", _hf_config(model, preset))
    size = model.image_size
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(model.image_mean),
            "image_std": list(model.image_std),
            "do_convert_rgb": True,
        },
    )
    _save_tokenizer(model.context_length, folder)


def save_tensors(model: CLIP, path: Path) -> None:
    """The state dict, names and shapes as they are here, as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_tensors(model.state_dict(), path)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # transformers refuses a file that does not say it is torch's.
    save_file(whole, path, metadata={"format": "pt"})


def _hf_config(model: CLIP, preset: Preset) -> dict[str, Any]:
    image, text = preset.image, preset.text
    assert not isinstance(image, ResNetConfig)
    start, end = CLIPTokenizer(model.context_length)("")[0, :2].tolist()
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": preset.embed_dim,
        "text_config": {
            **_hf_tower(text, preset),
            "model_type": "clip_text_model",
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        "vision_config": {
            **_hf_tower(image, preset),
            "model_type": "clip_vision_model",
            "patch_size": image.patch_size,
            "image_size": model.image_size,
        },
    }


def _hf_tower(tower: VisionTransformerConfig | TextTransformerConfig, preset: Preset) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": "quick_gelu" if preset.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": preset.embed_dim,
    }


def _save_tokenizer(context_length: int, folder: Path) -> None:
    words, merges = byte_pair_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"  # transformers' names for the last two words
    vocabulary = {word: index for index, word in enumerate([*list(words)[:-2], start, end])}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
    )
