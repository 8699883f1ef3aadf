"""The model: an image tower, a text tower and a learned temperature behind one forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.config import ConfigError, ModelConfig, Recipe
from neuclip_scale.models.presets import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, Preset, ResNetConfig, get_preset
from neuclip_scale.models.resnet import ModifiedResNet
from neuclip_scale.models.text import TextTransformer, TransformersTower, encode_tokens
from neuclip_scale.models.transformer import LayerNorm, Transformer
from neuclip_scale.models.vision import TimmTower, VisionTransformer

ImageTower = VisionTransformer | ModifiedResNet | TimmTower
TextTower = TextTransformer | TransformersTower


class CLIPOutput(NamedTuple):
    """What one forward gives; features are float32 rows of unit length."""

    image_features: Tensor | None
    """[N, embed_dim], or None when no images were given."""
    text_features: Tensor | None
    """[N, embed_dim], or None when no tokens were given."""
    logit_scale: Tensor
    """1/tau, float32, shape [1]."""
    logit_bias: Tensor | None
    """SigLIP's additive bias, float32, shape [1]; None in a model without one."""


class CLIP(nn.Module):
    """Two towers and `logit_scale`, a parameter of shape [1] that holds log(1/tau).

    CLIP's own text transformer lies on the model itself (`token_embedding`, `transformer`, ...), any other
    text tower under `text`, both as in open_clip, so that its checkpoints' names are these.
    """

    image_size: int
    """Edge of the square input in pixels."""
    context_length: int
    """Tokens per caption that the text tower takes at most."""
    embed_dim: int
    image_mean: tuple[float, float, float]
    """Channel means that the pictures are normalised with, for values in [0, 1]."""
    image_std: tuple[float, float, float]

    def __init__(
        self,
        visual: ImageTower,
        text: TextTower,
        *,
        embed_dim: int,
        image_size: int,
        image_mean: tuple[float, float, float] = CLIP_IMAGE_MEAN,
        image_std: tuple[float, float, float] = CLIP_IMAGE_STD,
        temperature_init: float = 0.07,
        logit_bias_init: float | None = None,
    ) -> None:
        super().__init__()
        if not temperature_init > 0:
            raise ConfigError("objective.temperature_init", temperature_init, "must be above zero", "CLIP's is 0.07.")
        self.embed_dim, self.image_size, self.context_length = embed_dim, image_size, text.context_length
        self.image_mean, self.image_std = image_mean, image_std
        self.visual = visual
        self.text: TransformersTower | None = None
        if isinstance(text, TransformersTower):
            self.text = text
        else:
            self.token_embedding: nn.Embedding = text.token_embedding
            self.positional_embedding: nn.Parameter = text.positional_embedding
            self.transformer: Transformer = text.transformer
            self.ln_final: LayerNorm = text.ln_final
            self.text_projection: nn.Parameter = text.text_projection
        # One element and not zero dimensions, which DeepSpeed and FSDP2 cannot shard.
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(temperature_init)))
        self.logit_bias: nn.Parameter | None = None
        if logit_bias_init is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(logit_bias_init)))

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> CLIPOutput:
        """Encode pictures [N, 3, H, W] (normalised), token ids [N, L], or both.

        Give both in training: a tower left out of a backward pass has no gradient, which DDP and ZeRO do not
        forgive.
        """
        return CLIPOutput(
            image_features=None if images is None else _unit_rows(self.visual(images)),
            text_features=None if tokens is None else _unit_rows(self._encode_text(tokens)),
            logit_scale=self.logit_scale.float().exp(),
            # A copy: the parameter's own memory is gone once FSDP2 has sharded it again.
            logit_bias=None if self.logit_bias is None else self.logit_bias.float().clone(),
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only block inputs for the backward pass of both towers, or (False) everything."""
        self.visual.set_grad_checkpointing(enable)
        if self.text is not None:
            self.text.set_grad_checkpointing(enable)
        else:
            self.transformer.grad_checkpointing = enable

    def blocks(self) -> Iterator[nn.Module]:
        """The towers' repeated parts, in the order they run: what sharding gathers and checkpointing recomputes.

        A tower without blocks of its own kind (timm, transformers) is one block.
        """
        for tower in (self.visual, self.text or self.transformer):
            transformer = tower if isinstance(tower, Transformer) else getattr(tower, "transformer", None)
            if isinstance(transformer, Transformer):
                yield from transformer.resblocks
            else:
                yield tower

    def compile_towers(self, **options: Any) -> None:
        """Compile each tower at its next call, in place: names in the state dict stay as they are.

        `options` go to `torch.compile`.
        """
        self.visual.compile(**options)
        (self.transformer if self.text is None else self.text).compile(**options)

    def _encode_text(self, tokens: Tensor) -> Tensor:
        return encode_tokens(self, tokens) if self.text is None else self.text(tokens)


def _unit_rows(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def build_model(config: Recipe) -> CLIP:
    """The untrained model of a recipe, on the CPU in float32; the caller seeds torch before.

    Uses `config.model`, and of `config.objective` the initial temperature and SigLIP's bias. Raises `ConfigError` for
    an unknown name or a combination that does not exist.
    """
    model = create_model(
        get_preset(config.model.preset),
        image_tower=config.model.image_tower,
        text_tower=config.model.text_tower,
        image_size=config.model.image_size,
        dropout=config.model.dropout,
        temperature_init=config.objective.initial_temperature,
        logit_bias_init=config.objective.bias_init if config.objective.name == "siglip" else None,
    )
    _prepare(model, config.model)
    return model


def create_model(
    preset: Preset,
    *,
    image_tower: str = "",
    text_tower: str = "",
    image_size: int = 0,
    dropout: float = 0.0,
    temperature_init: float = 0.07,
    logit_bias_init: float | None = None,
) -> CLIP:
    """The untrained model of a preset; a timm `image_tower` or transformers `text_tower` replaces the
    preset's own.

    `image_size` 0 takes the preset's, also for a timm tower. `logit_bias_init` adds SigLIP's bias. Raises
    `ConfigError`.
    """
    if not 0.0 <= dropout < 1.0:
        raise ConfigError("model.dropout", dropout, "not in [0, 1)", "Give a fraction below 1, 0 for none.")
    image_size = image_size or preset.image_size
    visual: ImageTower
    if image_tower:
        visual = TimmTower(image_tower, preset.embed_dim, image_size, dropout=dropout)
    elif isinstance(preset.image, ResNetConfig):
        if dropout:
            raise ConfigError(
                "model.dropout", dropout, "the ResNet image tower has no transformer blocks", "Set it to 0."
            )
        visual = ModifiedResNet(preset.image, preset.embed_dim, image_size)
    else:
        visual = VisionTransformer(
            preset.image, preset.embed_dim, image_size, quick_gelu=preset.quick_gelu, dropout=dropout
        )
    text: TextTower
    if text_tower:
        text = TransformersTower(text_tower, preset.embed_dim, preset.text.context_length, dropout=dropout)
    else:
        text = TextTransformer(preset.text, preset.embed_dim, quick_gelu=preset.quick_gelu, dropout=dropout)
    return CLIP(
        visual,
        text,
        embed_dim=preset.embed_dim,
        image_size=image_size,
        image_mean=preset.image_mean,
        image_std=preset.image_std,
        temperature_init=temperature_init,
        logit_bias_init=logit_bias_init,
    )


def _prepare(model: CLIP, config: ModelConfig) -> None:
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.compile:
        if config.grad_checkpointing and isinstance(model.visual, ModifiedResNet):
            raise ConfigError(
                "model.compile",
                True,
                "torch.compile cannot trace a ResNet's checkpoints, which hold back its batch statistics",
                "Turn off model.compile or model.grad_checkpointing.",
            )
        model.compile_towers()
