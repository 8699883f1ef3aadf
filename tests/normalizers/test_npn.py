"""The NPN's closed form against autograd and finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from neuclip_scale.normalizers import NormalizerPredictionNetwork

EPS = 1e-7


def setting() -> tuple[NormalizerPredictionNetwork, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    npn = NormalizerPredictionNetwork(5, num_prototypes=11, eps=EPS).double()
    npn.weight.mul_(torch.rand(11, 1, dtype=torch.float64) + 0.5)  # rows of any length: only directions count
    anchors = normalize(torch.randn(13, 5, dtype=torch.float64), dim=1)
    positives = torch.rand(13, dtype=torch.float64)
    log_g = torch.randn(13, dtype=torch.float64)
    index = torch.arange(13)
    npn.prototype_index[:4] = torch.tensor([2, 2, 5, 9])
    return npn, anchors, positives, log_g, index


def dense_loss(weight: Tensor, npn: NormalizerPredictionNetwork, anchors, positives, log_g, index, tau) -> Tensor:  # type: ignore[no-untyped-def]
    own = index[:, None] == npn.prototype_index
    terms = ((anchors @ normalize(weight, dim=1).T - positives[:, None]) / tau).exp().masked_fill(own, 0.0)
    a = (EPS + terms.sum(1) / (~own).sum(1)).log()
    return ((-a).exp() * (EPS + log_g.exp()) + a - 1).mean()


def test_forward_is_the_definition() -> None:
    npn, anchors, positives, _, index = setting()
    own = index[:, None] == npn.prototype_index
    terms = ((anchors @ normalize(npn.weight, dim=1).T - positives[:, None]) / 0.06).exp()
    plain = (EPS + terms.mean(1)).log()
    torch.testing.assert_close(npn(anchors, positives, 0.06, tile_size=4), plain)
    without_own = (EPS + terms.masked_fill(own, 0).sum(1) / (~own).sum(1)).log()
    torch.testing.assert_close(npn(anchors, positives, 0.06, index, tile_size=4), without_own)
    assert not torch.allclose(plain, without_own)


def test_gradient_equals_autograd_and_finite_differences() -> None:
    npn, anchors, positives, log_g, index = setting()
    target = torch.logaddexp(log_g, torch.tensor(EPS, dtype=torch.float64).log())
    closed = npn.gradient(anchors, positives, torch.tensor([0.06], dtype=torch.float64), target, index, tile_size=4)
    weight = npn.weight.clone().requires_grad_()
    dense_loss(weight, npn, anchors, positives, log_g, index, 0.06).backward()
    torch.testing.assert_close(closed, weight.grad, rtol=1e-10, atol=1e-12)
    step = 1e-6
    for k, c in [(0, 0), (3, 2), (10, 4)]:
        shifted = []
        for sign in (1, -1):
            moved = npn.weight.clone()
            moved[k, c] += sign * step
            shifted.append(dense_loss(moved, npn, anchors, positives, log_g, index, 0.06))
        slope = (shifted[0] - shifted[1]) / (2 * step)
        torch.testing.assert_close(slope, closed[k, c], rtol=1e-6, atol=1e-6)


def test_updates_are_torchs_adagrad_and_reach_the_minimiser() -> None:
    npn, anchors, positives, log_g, index = setting()
    weight = npn.weight.clone().requires_grad_()
    optimizer = torch.optim.Adagrad([weight], lr=0.05, eps=1e-10)
    for _ in range(7):
        optimizer.zero_grad()
        dense_loss(weight, npn, anchors, positives, log_g, index, 0.06).backward()
        optimizer.step()
    before = dense_loss(npn.weight, npn, anchors, positives, log_g, index, 0.06)
    for _ in npn.updates(anchors, positives, 0.06, log_g, index, num_updates=7, learning_rate=0.05):
        pass
    torch.testing.assert_close(npn.weight, weight.detach(), rtol=1e-7, atol=1e-9)
    assert dense_loss(npn.weight, npn, anchors, positives, log_g, index, 0.06) < before


def test_restart_replaces_prototypes_and_clears_the_accumulator() -> None:
    npn, anchors, positives, log_g, index = setting()
    for _ in npn.updates(anchors, positives, 0.06, log_g, index, num_updates=2):
        pass
    assert npn.squares.abs().sum() > 0
    fresh = normalize(torch.randn(11, 5, dtype=torch.float64), dim=1)
    npn.restart(fresh, torch.arange(11))
    assert torch.equal(npn.weight, fresh)
    assert npn.squares.abs().sum() == 0
    assert torch.equal(npn.prototype_index, torch.arange(11))
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(11, 5\)"):
        npn.restart(fresh[:3])


def test_an_anchor_without_a_foreign_prototype_predicts_eps_and_pulls_at_nothing() -> None:
    npn, anchors, positives, log_g, index = setting()
    npn.prototype_index.fill_(7)
    predicted = npn(anchors, positives, 0.06, index, tile_size=4)
    assert predicted[7] == torch.tensor(EPS, dtype=torch.float64).log()
    others = torch.arange(13) != 7
    torch.testing.assert_close(predicted[others], npn(anchors, positives, 0.06, tile_size=4)[others])
    alone = slice(7, 8)
    gradient = npn.gradient(anchors[alone], positives[alone], 0.06, log_g[alone], index[alone])
    assert torch.equal(gradient, torch.zeros_like(gradient))
