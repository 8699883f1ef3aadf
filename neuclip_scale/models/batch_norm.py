"""Running statistics of batch normalisation when one batch goes through a network twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from neuclip_scale import distributed


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer keeps running statistics of its batches."""
    return bool(_recording_layers(module))


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation still uses each batch's own statistics but does not record them.

    For the repeated forward passes of activation checkpointing and of the gradient cache: each batch must
    count once. The momentum is set to zero instead of restoring the buffers afterwards, because writing to
    them would invalidate the graph of the first pass.
    """
    layers = _recording_layers(module)
    saved = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked = layer.num_batches_tracked.clone()  # a counter to throw away
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, saved, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count


@torch.no_grad()
def share_running_statistics(module: nn.Module) -> None:
    """Give all ranks those of rank 0, which checkpoints keep (collective): each rank's are of its own pairs."""
    for layer in _recording_layers(module):
        for statistics in (layer.running_mean, layer.running_var):
            if statistics is not None:
                distributed.broadcast_from_main(statistics)


def _recording_layers(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
