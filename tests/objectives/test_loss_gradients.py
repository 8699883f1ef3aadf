"""Losses give autograd their gradients: once, twice, in part, and without holding more than they must."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from neuclip_scale import create_loss
from neuclip_scale.similarity import row_products
from neuclip_scale.similarity.sigmoid import _softplus_sum

B, D = 40, 8


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = normalize(torch.randn(B, D, generator=generator, dtype=dtype), dim=1)
    text = normalize(image + torch.randn(B, D, generator=generator, dtype=dtype), dim=1)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(9.0, dtype=dtype, requires_grad=True)


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * image @ text.T, torch.arange(B)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    image, text, scale = inputs()
    expected = torch.autograd.grad(3 * dense(image, text, scale), (image, text, scale))
    loss = 3 * create_loss("openclip", embed_dim=D, tile_size=16)(image, text, scale)
    for _ in range(2):
        found = torch.autograd.grad(loss, (image, text, scale), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_not_trained_gets_no_gradient_and_the_rest_theirs(frozen: int) -> None:
    given = inputs()
    expected = torch.autograd.grad(dense(*given), given)
    for number, tensor in enumerate(given):
        tensor.requires_grad_(number != frozen)
    create_loss("openclip", embed_dim=D, tile_size=16)(*given).backward()
    for number, tensor in enumerate(given):
        if number == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[number], rtol=1e-11, atol=1e-13)


def test_nothing_to_train_is_a_loss_without_a_graph() -> None:
    image, text, scale = (tensor.detach() for tensor in inputs())
    loss = create_loss("openclip", embed_dim=D)(image, text, scale)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, dense(image, text, scale), rtol=1e-12, atol=1e-12)


def test_a_gradient_is_freed_before_the_next_one_is_scaled() -> None:
    image, text, scale = inputs()
    loss = create_loss("openclip", embed_dim=D)(image, text, scale)
    node, freed = loss.grad_fn, []
    assert node.saved_tensors[0].shape == text.shape

    def look(gradient: Tensor) -> None:
        with pytest.raises(RuntimeError, match="already been freed"):
            node.saved_tensors  # noqa: B018
        freed.append(gradient.shape)

    image.register_hook(look)
    loss.backward()
    assert freed == [image.shape]


@pytest.mark.parametrize(
    "z",
    [
        torch.linspace(-30, 30, 601),
        torch.linspace(-1, 1, 300),
        torch.tensor([-17.0, -16.6, -80.0]),  # below fp32's rounding of 1 + e
        torch.tensor([88.0, 100.0, 1e4]),
    ],
)
def test_softplus_from_a_plain_logarithm_keeps_fp32(z: Tensor) -> None:
    ours = _softplus_sum(z, torch.empty(3, len(z) + 2))
    assert float(ours) == pytest.approx(float(-logsigmoid(-z.double()).sum()), rel=2e-6)


def test_a_bad_feature_is_not_hidden() -> None:
    assert _softplus_sum(torch.tensor([1.0, torch.nan]), torch.empty(3, 2)).isnan()


def test_row_products_over_ragged_parts() -> None:
    left, right = torch.randn(2, 2051, 3, dtype=torch.float64)
    torch.testing.assert_close(row_products(left, right), (left * right).sum(-1), rtol=1e-13, atol=1e-13)
