"""A temperature rests where the divergence of the negatives' weights is rho, and the warning knows when it cannot."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from neuclip_scale.config import ObjectiveConfig
from neuclip_scale.losses import create_loss
from neuclip_scale.objectives.temperature import out_of_reach


def divergence(image: torch.Tensor, text: torch.Tensor, tau: float) -> float:
    """Mean KL of softmax(s_ij/tau) over the negatives from the uniform distribution, over anchors and sides."""
    B = len(image)
    logits = (image @ text.T / tau).masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf)
    total = 0.0
    for side in (logits, logits.T):
        p = side.softmax(1)
        total += float((p * (p * (B - 1)).clamp_min(1e-300).log()).sum(1).mean())
    return total / 2


@pytest.mark.parametrize("tau", [0.5, 0.05, 0.01])
def test_the_gradient_of_tau_is_rho_less_the_divergence(tau: float) -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(24, 8, dtype=torch.float64), dim=1) for _ in range(2))
    loss = create_loss("rgcl-g", embed_dim=8, rho=2.0, eps=1e-300).double()
    scale = torch.tensor([1 / tau], dtype=torch.float64, requires_grad=True)
    loss(image, text, scale).backward()
    assert scale.grad is not None
    by_tau = -float(scale.grad) / tau**2
    assert by_tau == pytest.approx(2 * (2.0 - divergence(image, text, tau)), rel=1e-9)
    assert divergence(image, text, tau) <= math.log(23)


@pytest.mark.parametrize(
    ("name", "rho", "bound"),
    [("neuclip", 8.5, 4000), ("fastclip-v3", 8.5, 4000), ("rgcl-g", 6.0, 256), ("neuclip-queue", 20.0, 10**8)],
)
def test_a_rho_out_of_reach_is_told_with_a_remedy(name: str, rho: float, bound: int) -> None:
    section = ObjectiveConfig(name=name, rho=rho)
    told = out_of_reach(section, dataset_size=10**8 if bound == 10**8 else 4000, global_batch_size=256)
    assert f"objective.rho = {rho:g}" in told
    assert f"{bound - 1:,}" in told
    assert "temperature_min = 0.01" in told
    assert "Try objective.rho=" in told


@pytest.mark.parametrize("name", ["openclip", "siglip", "sogclr", "fastclip-v0", "fastclip-v1", "amorlip"])
def test_methods_without_the_term_are_left_alone(name: str) -> None:
    assert not out_of_reach(ObjectiveConfig(name=name, rho=99.0), dataset_size=100, global_batch_size=10)


def test_published_settings_are_within_reach() -> None:
    for rho, pairs in ((6.5, 2_723_840), (8.5, 9_187_328), (11.0, 13_710_637)):
        section = ObjectiveConfig(name="neuclip", rho=rho)
        assert not out_of_reach(section, dataset_size=pairs, global_batch_size=1024)
