"""What a foreign trainer gives a loss: values and sample indices that cannot be right are refused."""

from __future__ import annotations

from typing import Any

import pytest

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


def test_bounds_of_a_temperature_that_is_the_trainers_do_not_count() -> None:
    create_loss("neuclip", embed_dim=D, temperature_min=0.1)
