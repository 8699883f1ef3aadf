"""Objectives over Triton's kernels against the same over torch. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton_problems import DEVICE

from neuclip_scale.losses import create_loss
from neuclip_scale.similarity import PairFeatures, dispatch, triton_check
from neuclip_scale.similarity.choosing import SIMILARITIES, VARIABLE, choose

N, B, D = 50, 21, 32
OPTIONS: dict[str, dict[str, Any]] = {
    "openclip": {},
    "siglip": {},
    "fastclip-v3": {"num_epochs": 4},
    "fastclip-v2": {"num_epochs": 4},
    "amorlip": {"updates_per_step": 1, "blend_epochs": 0},
    "neuclip": {"num_prototypes": 16, "updates_per_step": 3, "restart_every": 2},
}


def two_steps(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of image, text, logit_scale and bias, at both steps."""
    torch.manual_seed(5)
    loss = create_loss(name, embed_dim=D, dataset_size=N, **OPTIONS[name]).to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(2):
        image = normalize(torch.randn(B, D, generator=generator), dim=1)
        text = normalize(image + 0.2 * torch.randn(B, D, generator=generator), dim=1)
        index = torch.randperm(N, generator=generator)[:B].to(DEVICE)
        leaves = [each.to(DEVICE, dtype).requires_grad_() for each in (image, text)]
        leaves += [torch.tensor([value], device=DEVICE, requires_grad=True) for value in (14.0, -10.0)]
        bias = leaves[3] if name == "siglip" else None
        value = loss(leaves[0], leaves[1], leaves[2], bias, index)
        value.backward()
        found += [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIONS), *((n, torch.bfloat16) for n in ("openclip", "siglip", "neuclip"))],
)
def test_two_steps_of_an_objective(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}
    for path in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, path)
        pair = torch.zeros(1, D, device=DEVICE, dtype=dtype)
        assert choose(SIMILARITIES, pair).name == path
        results[path] = two_steps(name, dtype)
    assert len(results["torch"]) == len(results["triton"]) == 2 * (5 if name == "siglip" else 4)
    for mine, theirs in zip(results["triton"], results["torch"]):
        assert mine.dtype == theirs.dtype
        limit = 1e-4 if dtype == torch.float32 else 2e-2
        largest = float(theirs.abs().max())
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=limit, atol=limit * largest)


def test_every_function_goes_where_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dispatched function gives the bits of the path that was chosen."""
    image, text = (normalize(torch.randn(2, 25, D, device=DEVICE), dim=2)).unbind()
    pairs, scale = PairFeatures.single(image, text), torch.tensor([9.0], device=DEVICE)
    scales = scale.expand(25, 2).contiguous()
    bits = {}
    for path in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, path)
        rows = dispatch.pair_logsumexp(pairs, scale, exclude_diagonal=True)
        sides = dispatch.pair_row_sums(pairs, scales)
        gradients = dispatch.pair_gradients(pairs, scale, *rows, exclude_diagonal=False)
        sums = dispatch.pair_sigmoids(pairs, scale, -scale)
        bits[path] = [[*rows], [*sides[0], *sides[1]], [*gradients], [*sums]]
    for ours, theirs in zip(bits["triton"], bits["torch"]):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-5)
        assert not all(torch.equal(a, b) for a, b in zip(ours, theirs)), "both came from one implementation"


def test_the_check_that_a_device_must_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "_SIZE", 30)
    monkeypatch.setattr(triton_check, "_OWN", slice(7, 21))
    assert triton_check.disagreement(DEVICE, torch.bfloat16, 24) == ""
    right = triton_check.triton_sweeps.pair_gradients

    def wrong(pairs: PairFeatures, *values: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        image, text = right(pairs, *values, **options)
        image[-1] = 0  # as a mask that is off by one row would
        return image, text

    monkeypatch.setattr(triton_check.triton_sweeps, "pair_gradients", wrong)
    assert "gradients are off" in triton_check.disagreement(DEVICE, torch.bfloat16, 24)
