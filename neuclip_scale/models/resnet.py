"""CLIP's modified ResNet (Radford et al. 2021, section 2.4), with open_clip's parameter names.

It departs from ResNet-D in three places: every stride is an average pool (anti-aliasing) beside a convolution
of stride one, the stem has three convolutions, and the last feature map is pooled by one query of a
multi-head attention.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuclip_scale.config import ConfigError
from neuclip_scale.models.batch_norm import frozen_running_statistics
from neuclip_scale.models.presets import ResNetConfig
from neuclip_scale.projection import Projection, TowerOutput

_TOTAL_STRIDE = 32  # stem 4, then 2 in each of three stages
_EXPANSION = 4  # a bottleneck's output channels over its inner ones


class Bottleneck(nn.Module):
    """1x1, 3x3, (pool), 1x1 convolutions and a skip; [N, C, H, W] -> [N, 4 planes, H/stride, W/stride]."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values, after those of the parts: each block starts as its skip."""
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))
        skip = x if self.downsample is None else self.downsample(x)
        return F.relu(y + skip, inplace=True)


class AttentionPool(nn.Module):
    """Pool a feature map by attention whose only query is its mean, [N, C, H, W] -> [N, embed_dim].

    Initial values: the four matrices normal with standard deviation C ** -0.5, positions likewise.
    """

    def __init__(self, size: int, channels: int, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(size**2 + 1, channels))
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)
        self.shows_projection = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values, after those of the parts."""
        std = self.k_proj.in_features**-0.5
        nn.init.normal_(self.positional_embedding, std=std)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=std)

    def extra_repr(self) -> str:
        """See `transformer.Attention.extra_repr`."""
        return f"heads={self.heads}"

    def forward(self, x: Tensor) -> TowerOutput:
        x = x.flatten(2).transpose(1, 2)  # [N, HW, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, heads, L, C/heads]
        y = F.scaled_dot_product_attention(q, k, v).flatten(1)  # [N, C]
        return TowerOutput(self.c_proj(y), Projection.of_linear(y, self.c_proj) if self.shows_projection else None)


class ModifiedResNet(nn.Module):
    """The whole image tower, [N, 3, H, W] -> [N, embed_dim]."""

    def __init__(self, config: ResNetConfig, embed_dim: int, image_size: int) -> None:
        super().__init__()
        if image_size % _TOTAL_STRIDE:
            lower = image_size // _TOTAL_STRIDE * _TOTAL_STRIDE
            raise ConfigError(
                "model.image_size",
                image_size,
                f"not a multiple of the network's stride {_TOTAL_STRIDE}",
                f"Use {lower or _TOTAL_STRIDE} or {lower + _TOTAL_STRIDE}.",
            )
        width = config.width
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        first, second, third, fourth = config.blocks
        self.layer1 = _stage(width, width, first, stride=1)
        self.layer2 = _stage(4 * width, 2 * width, second, stride=2)
        self.layer3 = _stage(8 * width, 4 * width, third, stride=2)
        self.layer4 = _stage(16 * width, 8 * width, fourth, stride=2)
        channels = 32 * width
        self.attnpool = AttentionPool(image_size // _TOTAL_STRIDE, channels, embed_dim, config.heads)
        self.projected_width = channels + 1  # the last map has a bias

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.grad_checkpointing = enable

    @property
    def shows_projection(self) -> bool:
        return self.attnpool.shows_projection

    @shows_projection.setter
    def shows_projection(self, shows: bool) -> None:
        self.attnpool.shows_projection = shows

    def forward(self, images: Tensor) -> TowerOutput:
        # Channels last: what tensor cores convolve, and every layer keeps the order that it is given.
        x = images.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(convolution(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self._run_stage(stage, x)
        return self.attnpool(x)

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return stage(x)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), frozen_running_statistics(stage)  # (forward, recomputation)

        return checkpoint(stage, x, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


def _stage(in_channels: int, planes: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    """`num_blocks` bottlenecks of which the first has the stride."""
    rest = (Bottleneck(_EXPANSION * planes, planes, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(Bottleneck(in_channels, planes, stride), *rest)
