"""The mixture of horizons: it finds the better one, never gives one up, and survives batches like no other before."""

from __future__ import annotations

import torch

from neuclip_scale.normalizers import HorizonMixture

HORIZONS = torch.tensor([8.0, 64.0, torch.inf])
FIRST = torch.tensor([[0.5, 0.25, 0.25]] * 2, dtype=torch.float64)


def teach(mixture: HorizonMixture, errors: torch.Tensor, steps: int, noise: float = 1.0) -> None:
    """Batches of 16 anchors whose log g is 0 but for `noise`; horizon h of a side says `errors` [2, 3]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        # exp of it has mean 1, which is what an estimate of the mean is held against
        batch = noise * torch.randn(16, 2, generator=generator) - noise**2 / 2
        past = errors + 0.1 * torch.randn(16, 2, 3, generator=generator)
        gradients = mixture.gradients(past, batch)
        mixture.learn(gradients.sum(0), torch.tensor(16.0))


def test_each_side_finds_its_better_horizon_through_noise_and_finds_back() -> None:
    mixture = HorizonMixture(HORIZONS)
    teach(mixture, torch.tensor([[0.0, 0.6, 0.6], [-0.6, -0.6, 0.0]]), 300)
    assert mixture.weights.argmax(1).tolist() == [0, 2]
    assert mixture.weights.amax(1).min() > 0.8
    teach(mixture, torch.tensor([[0.6, 0.6, 0.0], [0.0, -0.6, -0.6]]), 300)
    assert mixture.weights.argmax(1).tolist() == [2, 0]


def test_errors_on_both_sides_of_the_truth_are_mixed() -> None:
    mixture = HorizonMixture(HORIZONS)
    errors = torch.tensor([[0.5, 0.5, -0.7]] * 2)
    teach(mixture, errors, 300)
    mixed = mixture.mix(errors.expand(1, 2, 3))
    assert mixed.abs().max() < 0.15, "better than any of them"


def test_a_gradient_is_that_of_the_loss() -> None:
    torch.manual_seed(1)
    mixture = HorizonMixture(HORIZONS)
    mixture.weights.copy_(torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]]))
    past, batch = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    weights = mixture.weights.clone().requires_grad_()
    a = (weights * past.exp()).sum(-1).log()
    ((batch - a).exp() + a - 1).sum().backward()
    torch.testing.assert_close(mixture.gradients(past, batch).sum(0), weights.grad)


def test_no_anchor_changes_nothing_and_no_batch_breaks_it() -> None:
    mixture = HorizonMixture(HORIZONS)
    mixture.learn(torch.zeros(2, 3), torch.tensor(0.0))
    torch.testing.assert_close(mixture.weights, FIRST)
    for batch in (torch.full((4, 2), 200.0), torch.full((4, 2), -200.0)):
        past = torch.tensor([90.0, 0.0, -90.0]).expand(4, 2, 3)
        for _ in range(50):
            mixture.learn(mixture.gradients(past, batch).sum(0), torch.tensor(4.0))
        torch.testing.assert_close(mixture.weights.sum(1), torch.ones(2, dtype=torch.float64))
        assert mixture.weights.min() > 0.9e-3


def test_a_checkpoint_of_older_code_begins_with_the_first_weights() -> None:
    mixture = HorizonMixture(HORIZONS)
    teach(mixture, torch.tensor([[0.0, 0.6, 0.6], [0.0, 0.6, 0.6]]), 30)
    kept = {key: value.clone() for key, value in mixture.state_dict().items()}
    older = HorizonMixture(HORIZONS)
    older.load_state_dict({"losses": torch.tensor([0.3, 0.2, 0.4]), "started": torch.tensor(True)})
    torch.testing.assert_close(older.weights, FIRST)
    older.load_state_dict(kept)
    assert torch.equal(older.weights, mixture.weights)
