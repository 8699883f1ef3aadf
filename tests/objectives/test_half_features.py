"""Features in bf16 and fp16 keep their type through an objective, and lose nothing but what they round themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from neuclip_scale.losses import create_loss
from neuclip_scale.normalizers import DatasetFeatures
from neuclip_scale.objectives.registry import OBJECTIVES

N, B, D = 40, 13, 16


def three_steps(name: str, dtype: torch.dtype, as_dtype: torch.dtype) -> list[Tensor]:
    """Losses and gradients for features rounded to `dtype` and given as `as_dtype`."""
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, N, D, generator=generator)
    known = DatasetFeatures(normalize(image, dim=1), normalize(text, dim=1), torch.arange(N))
    options: dict[str, Any] = {
        "neuclip": {"num_prototypes": 8, "restart_every": 2, "updates_per_step": 2},
        "neuclip-queue": {"size": 26},
        "amorlip": {"blend_epochs": 0, "updates_per_step": 2},
        "exact": {"encode_dataset": lambda: known},
    }.get(name, {})
    torch.manual_seed(0)
    loss = create_loss(name, embed_dim=D, dataset_size=N, num_epochs=4, tile_size=5, **options)
    found = []
    for _ in range(3):
        index = torch.randperm(N, generator=generator)[:B]
        leaves = [
            normalize(side[index] + 0.3 * torch.randn(B, D, generator=generator), dim=1).to(dtype).to(as_dtype)
            for side in (image, text)
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves] + [torch.tensor([12.0], requires_grad=True)]
        value = loss(*leaves, torch.tensor([-9.0]) if name == "siglip" else None, index)
        value.backward()
        found += [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_halves_equal_their_fp32_copies(name: str, dtype: torch.dtype) -> None:
    halves, copies = three_steps(name, dtype, dtype), three_steps(name, dtype, torch.float32)
    assert len(halves) == 12
    for place, (mine, theirs) in enumerate(zip(halves, copies)):
        is_feature = place % 4 in (1, 2)
        assert mine.dtype == (dtype if is_feature else torch.float32)
        limit = torch.finfo(dtype).eps if is_feature else 1e-6
        torch.testing.assert_close(mine.float(), theirs, rtol=limit, atol=limit * float(theirs.abs().max()))


def test_a_grad_scalers_factor_comes_before_the_rounding_to_fp16() -> None:
    """What pairs already far apart ask for is less than fp16 has digits for; 65,536 times that is not."""
    found = []
    for dtype in (torch.float16, torch.float32):
        leaves = [torch.eye(8).to(dtype).requires_grad_() for _ in range(2)]
        loss = create_loss("openclip", embed_dim=8, dataset_size=N, num_epochs=4)(*leaves, torch.tensor([15.0]))
        (loss * 65536).backward()
        found += [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
    for half, full in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(half, full, rtol=2e-3, atol=0)
