"""How a GPU multiplies fp32 numbers is set from the recipe; torch's own setting can be read without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from neuclip_scale.config import TrainConfig
from neuclip_scale.engines.base import set_matmul_precision


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "wanted", "expected"),
    [
        ("fp32", "auto", "highest"),
        ("bf16", "auto", "medium"),
        ("fp16", "auto", "medium"),
        ("bf16", "highest", "highest"),
        ("fp32", "high", "high"),
    ],
)
def test_as_fine_as_the_encoders_products(
    precision: Literal["fp32", "bf16", "fp16"], wanted: Literal["auto", "highest", "high"], expected: str
) -> None:
    torch.set_float32_matmul_precision("medium" if expected != "medium" else "highest")
    set_matmul_precision(TrainConfig(precision=precision, matmul_precision=wanted), torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == expected


def test_a_cpu_is_left_alone() -> None:
    set_matmul_precision(TrainConfig(precision="bf16", matmul_precision="medium"), torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
