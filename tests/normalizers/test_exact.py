"""Exact log-normalizers against loops in numpy, and their statistics by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuclip_scale.normalizers.exact import error_statistics, exact_log_normalizers


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64), dim=-1)


def by_hand(
    anchors: np.ndarray,
    partners: np.ndarray,
    places: list[int],
    reference: np.ndarray,
    tau: float,
    eps: float,
) -> list[float]:
    rows = []
    for anchor, partner, place in zip(anchors, partners, places, strict=True):
        others = [reference[j] for j in range(len(reference)) if j != place]
        rows.append(math.log(eps + np.mean([math.exp((anchor @ x - anchor @ partner) / tau) for x in others])))
    return rows


@pytest.mark.parametrize("tile_size", [1, 5, 31, 64])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_against_loops(tile_size: int, eps: float) -> None:
    images, texts = unit(31, 0), unit(31, 1)
    places = [4, 0, 30, -1, 17]
    anchors_image, anchors_text = unit(5, 2), unit(5, 3)
    rows = exact_log_normalizers(
        anchors_image, anchors_text, torch.tensor(places), images, texts, 0.05, eps=eps, tile_size=tile_size
    )
    expected = (
        by_hand(anchors_image.numpy(), anchors_text.numpy(), places, texts.numpy(), 0.05, eps),
        by_hand(anchors_text.numpy(), anchors_image.numpy(), places, images.numpy(), 0.05, eps),
    )
    for got, want in zip(rows, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)


def test_whole_set_leaves_each_own_pair_out_and_survives_cold_temperatures() -> None:
    images, texts = unit(40, 0).float(), unit(40, 1).float()
    everyone = torch.arange(40)
    for tau in (torch.tensor([1e-3]), 1.0):
        image_rows, text_rows = exact_log_normalizers(images, texts, everyone, images, texts, tau, eps=1e-8)
        assert image_rows.dtype == torch.float64
        assert torch.isfinite(image_rows).all()
        assert torch.isfinite(text_rows).all()
    scores = (images.double() @ texts.double().T) - (images.double() * texts.double()).sum(1, keepdim=True)
    wanted = scores.exp().masked_fill(torch.eye(40, dtype=torch.bool), 0).sum(1) / 39
    torch.testing.assert_close(image_rows, (1e-8 + wanted).log())


def test_float32_is_close() -> None:
    arguments = (unit(7, 2), unit(7, 3), torch.arange(7), unit(50, 0), unit(50, 1), 0.07)
    double = exact_log_normalizers(*arguments, eps=1e-6)
    single = exact_log_normalizers(*arguments, eps=1e-6, dtype=torch.float32)
    torch.testing.assert_close(single[0].double(), double[0], atol=1e-5, rtol=0)


def test_bad_lengths_and_positions_are_named() -> None:
    a, ref = unit(3, 0), unit(9, 1)
    with pytest.raises(ValueError, match="give as many of each"):
        exact_log_normalizers(a, a[:2], torch.arange(3), ref, ref, 1.0, eps=0.0)
    with pytest.raises(ValueError, match="give pairs"):
        exact_log_normalizers(a, a, torch.arange(3), ref, ref[:5], 1.0, eps=0.0)
    with pytest.raises(ValueError, match="from -1 to 8"):
        exact_log_normalizers(a, a, torch.tensor([0, 1, 9]), ref, ref, 1.0, eps=0.0)
    with pytest.raises(ValueError, match="nothing to be compared"):
        exact_log_normalizers(a, a, torch.tensor([0, 0, 0]), ref[:1], ref[:1], 1.0, eps=0.0)


def test_statistics_by_hand() -> None:
    exact = torch.zeros(20, dtype=torch.float64)
    estimate = torch.tensor([1.0] * 18 + [-5.0, 3.0])
    statistics = error_statistics(estimate, exact)
    assert statistics["mse"] == pytest.approx((18 + 25 + 9) / 20)
    assert statistics["bias"] == pytest.approx((18 - 5 + 3) / 20)
    assert statistics["worst_decile"] == pytest.approx((5 + 3) / 2)
    with pytest.raises(ValueError, match="must be equal"):
        error_statistics(estimate[:3], exact)
