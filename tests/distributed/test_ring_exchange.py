"""Features that travel around a ring of real ranks against all of them on every rank, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError
from neuclip_scale.losses import create_loss
from neuclip_scale.objectives.registry import OBJECTIVES
from neuclip_scale.similarity.ring import RingPairs, blocks

pytestmark = pytest.mark.distributed

ROWS, DIM, STEPS = 7, 12, 3
NAMES = tuple(name for name in OBJECTIVES if name not in ("neuclip-queue", "exact"))


def features(step: int) -> tuple[Tensor, Tensor]:
    """Other rows on every rank and in every step."""
    generator = torch.Generator().manual_seed(100 * step + distributed.rank())
    image, text = (F.normalize(torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)) for _ in range(2))
    return image.requires_grad_(), F.normalize(text + image.detach()).requires_grad_()


def steps(name: str, exchange: str, tile_size: int) -> list[Tensor]:
    """Everything that a few steps give, and whatever state they leave."""
    world = distributed.world_size()
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_prototypes": 20, "restart_every": 2} if name == "neuclip" else {}
    loss = create_loss(
        name, embed_dim=DIM, dataset_size=50, num_epochs=4, tile_size=tile_size, exchange=exchange, **options
    )
    found = []
    for step in range(STEPS):
        image, text = features(step)
        scale = torch.tensor([9.0 + step], dtype=torch.float64, requires_grad=True)
        bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True) if name == "siglip" else None
        index = torch.arange(ROWS) * world + distributed.rank() + step
        value = loss(image, text, scale, bias, sample_index=index)
        value.backward()
        found += [value.detach(), image.grad, text.grad, scale.grad]
        found += [] if bias is None else [bias.grad]
        found += [] if name == "siglip" else list(loss.log_normalizers())
    return [*found, *(buffer.clone() for buffer in loss.buffers())]


def largest_difference(tile_size: int) -> dict[str, float]:
    """Relative to the largest entry, over all that any objective gives."""
    found = {}
    for name in NAMES:
        ring, gathered = steps(name, "ring", tile_size), steps(name, "gather", tile_size)
        assert len(ring) == len(gathered)
        found[name] = max(float((a - b).abs().max() / (1e-12 + b.abs().max())) for a, b in finite(ring, gathered))
    return found


def finite(ring: list[Tensor], gathered: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors in float64, without entries that are infinite in both."""
    both = [(a.double(), b.double()) for a, b in zip(ring, gathered, strict=True)]
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in both)
    kept = [(a[a.isfinite()], b[b.isfinite()]) for a, b in both]
    return [(a, b) for a, b in kept if a.numel()]


@pytest.mark.parametrize(("world_size", "tile_size"), [(2, 3), (4, 64), (3, 5)])
def test_a_ring_gives_what_gathering_does(world_size: int, tile_size: int) -> None:
    """Losses, gradients, normalizers and state of all objectives; tiles that do and do not divide a block."""
    for found in run_ranks(world_size, largest_difference, tile_size):
        assert found.keys() == set(NAMES)
        assert max(found.values()) < 1e-11, found


def held() -> tuple[list[int], int]:
    """Owners of the blocks as a rank meets them, and the most rows of others' features it was given at once."""
    image, text = (rows.detach() for rows in features(0))
    owners, most = [], 0
    for block in blocks(RingPairs.local(image, text)):
        owners.append(block.owner)
        most = max(most, len(block.world_image))
    return owners, most


def test_every_block_comes_once() -> None:
    found = run_ranks(3, held)
    assert [sorted(owners) for owners, _ in found] == [[0, 1, 2]] * 3
    assert [owners[0] for owners, _ in found] == [0, 1, 2], "a rank begins with what it has"
    assert {most for _, most in found} == {ROWS}


def test_halves_travel_as_they_are() -> None:
    (found, _) = run_ranks(2, of_halves)
    assert found < 2e-3


def of_halves() -> float:
    gradients = []
    for exchange in ("ring", "gather"):
        image, text = (rows.detach().bfloat16().requires_grad_() for rows in features(0))
        create_loss("openclip", embed_dim=DIM, exchange=exchange)(image, text, torch.tensor([9.0])).backward()
        gradients.append(image.grad.float())
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


@pytest.mark.parametrize("name", ["neuclip-queue", "exact"])
def test_objectives_that_need_all_pairs_say_why(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective.exchange = 'ring'.*{name}.*Use gather"):
        create_loss(name, embed_dim=DIM, exchange="ring")
