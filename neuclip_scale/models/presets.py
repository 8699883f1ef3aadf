"""Architectures by name: the sizes of both towers, as in open_clip's model configurations of the same name.

No torch here: a preset can be read without building a model.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from neuclip_scale.config import ConfigError, ModelConfig

# Channel statistics of CLIP's own training set; every model trained from scratch in open_clip uses them too.
CLIP_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """CLIP's ViT: a patch convolution, a class token, pre-norm blocks and a projection of the class token."""

    patch_size: int
    """Edge of a patch in pixels; also the stride."""
    width: int
    layers: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """CLIP's modified ResNet: three-convolution stem, blur-pooled strides, attention pooling."""

    width: int
    """Channels after the stem; the last stage has 32 times as many."""
    blocks: tuple[int, int, int, int]
    """Bottlenecks per stage."""
    heads: int
    """Heads of the attention pooling."""


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """CLIP's causal text transformer over its 49,408-word BPE vocabulary."""

    width: int
    layers: int
    heads: int
    context_length: int = 77
    """Tokens per caption, start and end tokens included."""
    vocab_size: int = 49408


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that fixes a model's parameters, short of their values."""

    embed_dim: int
    image: VisionTransformerConfig | ResNetConfig
    text: TextTransformerConfig
    image_size: int = 224
    """Edge of the square input in pixels."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) in place of GELU, which OpenAI's weights were trained with."""
    image_mean: tuple[float, float, float] = field(default=CLIP_IMAGE_MEAN)
    image_std: tuple[float, float, float] = field(default=CLIP_IMAGE_STD)


def _vit(
    embed_dim: int, image: tuple[int, int, int, int], text: tuple[int, int, int], context_length: int = 77
) -> Preset:
    """Preset from (patch_size, width, layers, heads) of the image and (width, layers, heads) of the text."""
    patch_size, width, layers, heads = image
    return Preset(
        embed_dim=embed_dim,
        image=VisionTransformerConfig(patch_size=patch_size, width=width, layers=layers, heads=heads),
        text=_text(*text, context_length=context_length),
    )


def _text(width: int, layers: int, heads: int, context_length: int = 77) -> TextTransformerConfig:
    return TextTransformerConfig(width=width, layers=layers, heads=heads, context_length=context_length)


_BASE: dict[str, Preset] = {
    "ViT-B-32": _vit(512, (32, 768, 12, 12), (512, 12, 8)),
    "ViT-B-16": _vit(512, (16, 768, 12, 12), (512, 12, 8)),
    "ViT-L-14": _vit(768, (14, 1024, 24, 16), (768, 12, 12)),
    "ViT-H-14": _vit(1024, (14, 1280, 32, 16), (1024, 24, 16)),
    "RN50": Preset(
        embed_dim=1024,
        image=ResNetConfig(width=64, blocks=(3, 4, 6, 3), heads=32),
        text=_text(512, 12, 8),
    ),
}

PRESETS: dict[str, Preset] = {
    **_BASE,
    **{f"{name}-quickgelu": dataclasses.replace(preset, quick_gelu=True) for name, preset in _BASE.items()},
    # Sized by measurement for the demo: forward and backward of 256 pairs in about half a second on two CPU
    # cores, most of it matrix products. Patches of 4 pixels would cost four times as much.
    "demo": dataclasses.replace(_vit(128, (8, 160, 4, 5), (128, 2, 2), context_length=16), image_size=32),
    # A seventh of the demo's products: for studies of many runs on a laptop.
    "toy": dataclasses.replace(_vit(64, (8, 80, 2, 5), (64, 1, 2), context_length=16), image_size=32),
}


def preset_of(config: ModelConfig) -> Preset:
    """The preset that a recipe names, with the sizes it sets itself; raises `ConfigError`."""
    preset = get_preset(config.preset)
    image, text = preset.image, preset.text
    if config.image_layers:
        if isinstance(image, ResNetConfig):
            raise ConfigError(
                "model.image_layers", config.image_layers, "a ResNet counts no such layers", "Set it to 0."
            )
        image = dataclasses.replace(image, layers=config.image_layers)
    if config.text_layers:
        text = dataclasses.replace(text, layers=config.text_layers)
    return dataclasses.replace(preset, image=image, text=text, image_size=config.image_size or preset.image_size)


def get_preset(name: str) -> Preset:
    """The preset called `name`; raises `ConfigError` with the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=3)
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"Presets: {', '.join(PRESETS)}."
    raise ConfigError("model.preset", name, "there is no such preset", remedy)


def differences(found: Preset, asked: Preset, towers: Sequence[str] = ("image", "text")) -> list[str]:
    """In what `towers` of weights made with `found` would not be those of `asked`, shapes or not, in words."""
    pairs = {"image": (found.image, asked.image), "text": (found.text, asked.text)}
    different = [
        f"{name}: {pairs[name][0]} there, {pairs[name][1]} here" for name in towers if pairs[name][0] != pairs[name][1]
    ]
    if found.quick_gelu != asked.quick_gelu:
        different.append(f"quick_gelu: {found.quick_gelu} there, {asked.quick_gelu} here")
    for what in ("image_mean", "image_std") if "image" in towers else ():
        theirs, ours = getattr(found, what), getattr(asked, what)
        if max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > 1e-3:
            different.append(f"{what}: {theirs} there, {ours} here")
    return different
