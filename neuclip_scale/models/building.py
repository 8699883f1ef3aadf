"""From a recipe to a model: its plan on the meta device, where it takes no memory, then its values block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neuclip_scale.config import ConfigError, Recipe
from neuclip_scale.models.batch_norm import has_batch_norm
from neuclip_scale.models.clip import CLIP, ImageTower, TextTower
from neuclip_scale.models.layers import lock_tower
from neuclip_scale.models.presets import Preset, ResNetConfig, preset_of
from neuclip_scale.models.pretrained import pretrained_values
from neuclip_scale.models.resnet import ModifiedResNet
from neuclip_scale.models.text import TextTransformer, TransformersTower
from neuclip_scale.models.vision import TimmTower, VisionTransformer

META = torch.device("meta")


def build_model(config: Recipe) -> CLIP:
    """The model that a recipe starts from, on the CPU in float32; the caller seeds torch before.

    Uses `config.model`, and of `config.objective` the initial temperature and SigLIP's bias. Raises `ConfigError` for
    an unknown name or a combination that does not exist.
    """
    model = plan_model(config)
    model.starting_values = pretrained_values(config.model, model)
    return fill(model)


def plan_model(config: Recipe, *, compiled: bool | None = None) -> CLIP:
    """The same model on the meta device, without memory or values: `filled_blocks` gives it both.

    A tower of timm or transformers is built by their code, whole and with its values. `compiled` takes the place of
    `model.compile`, where the machine has been asked.
    """
    model = _plan(
        preset_of(config.model),
        image_tower=config.model.image_tower,
        text_tower=config.model.text_tower,
        dropout=config.model.dropout,
        temperature_init=config.objective.initial_temperature,
        logit_bias_init=config.objective.bias_init if config.objective.name == "siglip" else None,
    )
    if config.model.lock:
        lock_tower(model, config.model.lock, config.model.unlocked_layers)
    _prepare(model, config, config.model.compile is True if compiled is None else compiled)
    return model


def create_model(preset: Preset, **options: Any) -> CLIP:
    """The untrained model of a preset, on the CPU in float32.

    Options: a timm `image_tower` or transformers `text_tower` replaces the preset's own; `image_size` (0 takes the
    preset's, also for a timm tower), `dropout`, `temperature_init`; `logit_bias_init` adds SigLIP's bias. Raises
    `ConfigError`.
    """
    return fill(_plan(preset, **options))


def fill(model: CLIP) -> CLIP:
    """Give a planned model its values."""
    for _ in filled_blocks(model):
        pass
    return model


@torch.no_grad()
def filled_blocks(model: CLIP) -> Iterator[nn.Module]:
    """Give a planned model its values, yielding each of its blocks and then the model itself once they are whole.

    Whoever shards a block before asking for the next never holds more than one, beside embeddings and projections.
    Initial values come from torch's CPU generator in an order that nothing else changes: the same on all ranks and
    under every engine. A model that has values already is left as it is.
    """
    values, names = model.starting_values, {module: name for name, module in model.named_modules()}
    planned = {module for module in model.modules() if any(p.is_meta for p in module.parameters())}
    done: set[nn.Module] = set()
    for part in [*model.blocks(), model]:
        new = [module for module in _children_first(part) if module not in done]
        done.update(new)
        for module in new:
            if module in planned:
                module.to_empty(device="cpu", recurse=False)
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
        for module in new:  # when all are reset: a module's initial values may reach into its parts
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                value = values.get(f"{names[module]}.{name}".removeprefix("."))
                if value is not None:
                    tensor.copy_(value)
        yield part
    model.starting_values = {}


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def _plan(
    preset: Preset,
    *,
    image_tower: str = "",
    text_tower: str = "",
    image_size: int = 0,
    dropout: float = 0.0,
    temperature_init: float = 0.07,
    logit_bias_init: float | None = None,
) -> CLIP:
    """See `create_model`. This project's own towers are on the meta device, others are whole."""
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
        with META:
            visual = ModifiedResNet(preset.image, preset.embed_dim, image_size)
    else:
        with META:
            visual = VisionTransformer(
                preset.image, preset.embed_dim, image_size, quick_gelu=preset.quick_gelu, dropout=dropout
            )
    text: TextTower
    if text_tower:
        text = TransformersTower(text_tower, preset.embed_dim, preset.text.context_length, dropout=dropout)
    else:
        with META:
            text = TextTransformer(preset.text, preset.embed_dim, quick_gelu=preset.quick_gelu, dropout=dropout)
    with META:
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


def _prepare(model: CLIP, config: Recipe, compiled: bool) -> None:
    if config.model.cuda_graphs and has_batch_norm(model.visual):
        raise ConfigError(
            "model.cuda_graphs", True, "a graph with BatchNorm's statistics was never tried", "Turn it off."
        )
    model.packs_captions = model.packs_captions and config.model.pack_captions
    if config.model.grad_checkpointing:
        model.set_grad_checkpointing()
    if compiled:
        if config.model.grad_checkpointing and isinstance(model.visual, ModifiedResNet):
            raise ConfigError(
                "model.compile",
                True,
                "torch.compile cannot trace a ResNet's checkpoints, which hold back its batch statistics",
                "Turn off model.compile or model.grad_checkpointing.",
            )
        # FSDP2 gathers a block's parameters before it: what is compiled must lie between two gatherings.
        by_block = config.engine.name == "fsdp2"
        model.compile_towers(by_block=by_block, cuda_graphs=config.model.cuda_graphs)
