"""What a foreign trainer gives a loss: values and sample indices that cannot be right are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuclip_scale.config import ConfigError
from neuclip_scale.losses import create_loss

N, D = 6, 8


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("neuclip", {"learning_rate": -1.0}, r"npn\.learning_rate"),
        ("neuclip", {"updates_per_step": 0}, r"npn\.updates_per_step"),
        ("neuclip", {"eps": -1.0}, "eps"),
        ("neuclip-queue", {"batch_weight": 2.0}, r"queue\.batch_weight"),
        ("fastclip-v3", {"gamma_min": 2.0}, "gamma_min"),
        ("amorlip", {"ema_every": 0}, r"amortized\.ema_every"),
        ("openclip", {"tile_size": 0}, "tile_size"),
        ("fastclip-v2", {"temperature_min": 0.1}, "temperature_init"),  # its own begins at 0.03
    ],
)
def test_values_that_no_run_takes_are_refused(name: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{field} = "):
        create_loss(name, embed_dim=D, dataset_size=N, **options)


@pytest.mark.parametrize("name", ["fastclip-v3", "fastclip-v2"])
@pytest.mark.parametrize("wrong", [N, -1, -3])
def test_a_sample_index_without_a_row_is_refused(name: str, wrong: int) -> None:
    """Counted from 1, or unknown: the row behind the last, which no checkpoint keeps, or another sample's."""
    image, text = torch.nn.functional.normalize(torch.randn(2, 3, D), dim=-1)
    loss = create_loss(name, embed_dim=D, dataset_size=N)
    with pytest.raises(ValueError, match=rf"sample_index = {wrong}: outside 0 to {N - 1}\."):
        loss(image, text, torch.tensor([10.0]), sample_index=torch.tensor([0, wrong, 2]))
    assert loss(image, text, torch.tensor([10.0]), sample_index=torch.tensor([0, N - 1, 2])).isfinite()


def test_bounds_of_a_temperature_that_is_the_trainers_do_not_count() -> None:
    create_loss("neuclip", embed_dim=D, temperature_min=0.1)
