"""Image towers: CLIP's ViT, and any model of timm behind a linear projection.

Every tower maps pictures [N, 3, H, W], normalised, to a `TowerOutput`.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.config import ConfigError
from neuclip_scale.models.batch_norm import has_batch_norm
from neuclip_scale.models.presets import VisionTransformerConfig
from neuclip_scale.models.timm_library import import_timm
from neuclip_scale.models.transformer import LayerNorm, Transformer
from neuclip_scale.projection import Projection, TowerOutput


class PatchEmbedding(nn.Conv2d):
    """Pictures [N, 3, H, W] to a linear map of each of their patches, [N, patches, width].

    A convolution whose stride is its size, so one matrix product, which GPUs do much faster than they do that
    convolution's gradient. Name, shape and initial values of its weight are the convolution's.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        N, channels, height, width = images.shape
        edge = self.kernel_size[0]
        patches = images.reshape(N, channels, height // edge, edge, width // edge, edge).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(N, -1, channels * edge * edge), self.weight.flatten(1))


class VisionTransformer(nn.Module):
    """CLIP's ViT with open_clip's parameter names.

    Initial values as in CLIP and open_clip: class token, positions and projection are normal with standard
    deviation width ** -0.5; the patch convolution and the blocks keep PyTorch's defaults (see
    `transformer.Attention`).
    """

    def __init__(
        self,
        config: VisionTransformerConfig,
        embed_dim: int,
        image_size: int,
        *,
        quick_gelu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        if image_size % patch:
            lower = image_size // patch * patch
            raise ConfigError(
                "model.image_size",
                image_size,
                f"not a multiple of the patch size {patch}",
                f"Use {lower or patch} or {lower + patch}.",
            )
        num_patches = (image_size // patch) ** 2
        self.conv1 = PatchEmbedding(width, patch)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(num_patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, quick_gelu=quick_gelu, dropout=dropout)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self.projected_width, self.shows_projection = width, False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of what is not in a part."""
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=len(self.class_embedding) ** -0.5)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.transformer.grad_checkpointing = enable

    def forward(self, images: Tensor) -> TowerOutput:
        x = self.conv1(images.to(self.conv1.weight.dtype))  # [N, num_patches, width]
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.ln_post(self.transformer(self.ln_pre(x), 0))  # [N, width]
        return TowerOutput(x @ self.proj, Projection.of(x, self.proj) if self.shows_projection else None)


class TimmTower(nn.Module):
    """A timm model with random weights, pooled as timm pools it, and a projection without bias.

    Names are open_clip's TimmModel's (`trunk.*`, `head.proj.weight`), with its `timm_pool=""` and
    `timm_proj="linear"`. Raises `ConfigError` when timm has no such model or the model cannot take
    `image_size` or `dropout`.
    """

    def __init__(self, name: str, embed_dim: int, image_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        timm = import_timm("model.image_tower")
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
            remedy = f"Did you mean {', '.join(close)}?" if close else "See timm.list_models()."
            raise ConfigError("model.image_tower", name, f"timm {timm.__version__} has no such model", remedy)
        self.name = name
        trunk = _create_trunk(timm, name, image_size, dropout)
        self.trunk: Any = trunk
        # Some timm models widen between their pooled features and the classifier that was taken off.
        width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(width, embed_dim, bias=False)))
        self.projected_width, self.shows_projection = int(width), False

    def set_grad_checkpointing(self, enable: bool) -> None:
        if enable and has_batch_norm(self.trunk):
            raise ConfigError(
                "model.grad_checkpointing",
                enable,
                f"{self.name} has batch normalisation, whose statistics would count every batch twice",
                "Set it to false, or choose a tower without batch normalisation.",
            )
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            # timm's convention for "not supported" is a missing method or a failed assertion.
            raise ConfigError(
                "model.grad_checkpointing",
                enable,
                f"timm does not support it for {self.name}",
                "Set it to false.",
            ) from error

    def forward(self, images: Tensor) -> TowerOutput:
        projection = cast(nn.Linear, self.head.proj)
        # Channels last, as in `resnet`: convolutions of a trunk that has them keep the order.
        x = self.trunk(images.to(projection.weight.dtype, memory_format=torch.channels_last))  # [N, width]
        return TowerOutput(self.head(x), Projection.of_linear(x, projection) if self.shows_projection else None)


def _create_trunk(timm: ModuleType, name: str, image_size: int, dropout: float) -> Any:
    """The timm model without its classifier; raises `ConfigError` when size or dropout do not suit it."""
    native = timm.get_pretrained_cfg(name)
    options: dict[str, int | float] = {}
    if native is not None and native.fixed_input_size and native.input_size[-2:] != (image_size, image_size):
        options["img_size"] = image_size
    if dropout:
        options["proj_drop_rate"] = dropout
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            "model.image_tower",
            name,
            f"timm cannot build it with {options} ({error})",
            "Set model.image_size to the tower's own, model.dropout to 0, or choose another tower.",
        ) from error
