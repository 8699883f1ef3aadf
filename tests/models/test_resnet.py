"""CLIP's ResNet: checkpointing must not count a batch twice in the running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuclip_scale.models.batch_norm import frozen_running_statistics, has_batch_norm
from neuclip_scale.models.presets import ResNetConfig
from neuclip_scale.models.resnet import ModifiedResNet


def _network() -> ModifiedResNet:
    torch.manual_seed(0)
    network = ModifiedResNet(ResNetConfig(width=8, blocks=(1, 2, 1, 1), heads=4), embed_dim=16, image_size=64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)  # zero at the start, so that blocks would have no gradient
    return network


def _images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64)


def test_shapes() -> None:
    assert _network()(_images()).features.shape == (4, 16)


def test_pictures_pass_channels_last() -> None:
    """What they give is open_clip's, whose pass channels first: `interop/test_open_clip_parity.py`."""
    network, seen = _network(), list[Tensor]()
    for stage in (network.layer1, network.layer4):
        stage.register_forward_hook(lambda part, given, x: seen.append(x))
    network(_images())
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [True, True]
    assert not any(x.is_contiguous() for x in seen)


def test_checkpointing_gives_the_same_gradients_and_statistics() -> None:
    plain, recomputed = _network(), _network()
    recomputed.set_grad_checkpointing(True)
    for network in (plain, recomputed):
        network(_images()).features.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0, msg=name)
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert recomputed.bn1.num_batches_tracked == recomputed.layer1[0].bn1.num_batches_tracked == 1
    assert recomputed.layer1[0].bn1.momentum == plain.layer1[0].bn1.momentum


def test_frozen_statistics_still_normalise_by_the_batch() -> None:
    network, images = _network(), _images()
    with frozen_running_statistics(network):
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        frozen = network(images).features
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    torch.testing.assert_close(network(images).features, frozen)
    assert not torch.equal(before["bn1.running_mean"], network.bn1.running_mean)


def test_has_batch_norm() -> None:
    assert has_batch_norm(_network())
    assert not has_batch_norm(nn.LayerNorm(3))
