"""A foreign trainer's checkpoint of a loss: `state_dict` alone brings everything back, or says that it cannot."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.nn.functional import normalize

from neuclip_scale import distributed
from neuclip_scale.losses import ContrastiveLoss, create_loss

N, B, D = 48, 12, 6
OPTIONS: dict[str, Any] = {"dataset_size": N, "num_prototypes": 16, "gamma_decay_epochs": 3, "size": 31}
WITH_PARTS = ("neuclip-queue", "fastclip-v3", "fastclip-v2")
"""A queue, a table, and a table with temperatures: each rank has a part."""


def losses_of(loss: ContrastiveLoss, steps: range) -> list[float]:
    """Values on batches of all ranks' pairs, of which this rank takes its rows."""
    rows = torch.arange(B).chunk(distributed.world_size())[distributed.rank()]
    values = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        image = torch.randn(B, D, generator=generator)
        text = image + 0.7 * torch.randn(B, D, generator=generator)
        index = torch.randperm(N, generator=generator)[:B]
        features = normalize(image, dim=1)[rows], normalize(text, dim=1)[rows]
        values.append(float(loss(*features, torch.tensor([12.0]), sample_index=index[rows])))
    return values


def saved(loss: ContrastiveLoss) -> bytes:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    return file.getvalue()


def loaded(name: str, content: bytes) -> ContrastiveLoss:
    loss = create_loss(name, embed_dim=D, **OPTIONS)
    loss.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return loss


def go_on(name: str, before: list[bytes] | None) -> tuple[list[float], list[float], bytes]:
    """Five steps, of which the last two are made again by a loss that was loaded before them."""
    loss = create_loss(name, embed_dim=D, **OPTIONS) if before is None else loaded(name, before[0])
    losses_of(loss, range(3))
    content = saved(loss)
    return losses_of(loss, range(3, 5)), losses_of(loaded(name, content), range(3, 5)), content


@pytest.mark.parametrize("name", [*WITH_PARTS, "openclip", "neuclip", "amorlip"])
def test_a_loaded_loss_goes_on(name: str) -> None:
    expected, found, _ = go_on(name, None)
    assert found == expected


def of_another(name: str, parts: list[bytes]) -> str:
    with pytest.raises(ValueError, match="Let every rank save") as caught:
        loaded(name, parts[1 - distributed.rank()])
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("name", WITH_PARTS)
def test_every_rank_has_its_own_part(name: str) -> None:
    _, _, alone = go_on(name, None)
    ranks = run_ranks(2, go_on, name, [alone])  # a single process's goes to any number of ranks
    assert ranks[0][:2] == ranks[1][:2]
    assert ranks[0][0] == ranks[0][1]
    parts = [content for _, _, content in ranks]
    assert run_ranks(2, of_another, name, parts)[0].startswith(
        "state_dict: the part of rank 1 of 2, loaded on rank 0 of 2."
    )
    with pytest.raises(ValueError, match="rank 0 of 2, loaded on rank 0 of 1"):
        loaded(name, parts[0])
