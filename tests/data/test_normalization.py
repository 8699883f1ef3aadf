"""Pixels travel as bytes and become the floats that torchvision would have made."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from data_helpers import MEAN, STD
from torchvision.transforms import functional as tv

from neuclip_scale.data.batch import Batch, join_batches
from neuclip_scale.data.normalization import Normalization

PIXELS = torch.arange(256, dtype=torch.uint8).repeat(5, 3, 1).reshape(5, 3, 16, 16)
LOOK = Normalization(MEAN, STD)


def waiting(rows: slice = slice(0, 5)) -> Batch:
    indices = torch.arange(5)[rows]
    return Batch(PIXELS[rows], torch.ones(len(indices), 4, dtype=torch.int64), indices, tuple("abcde"[rows]), LOOK)


def expected() -> torch.Tensor:
    return tv.normalize(PIXELS / 255, list(MEAN), list(STD))


def test_every_value_of_every_channel() -> None:
    ours = LOOK(PIXELS)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected(), atol=1e-6, rtol=0)
    exact = (PIXELS.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert (ours - exact).abs().max() <= 5e-7
    assert PIXELS.dtype == torch.uint8


@pytest.mark.parametrize("cuts", [[0, 5], [0, 2, 5], [0, 1, 2, 5]])
def test_joined_parts_are_normalised(cuts: list[int]) -> None:
    joined = join_batches([waiting(slice(start, stop)) for start, stop in pairwise(cuts)])
    assert torch.equal(joined.images, LOOK(PIXELS))
    assert (joined.normalization, joined.uids) == (None, tuple("abcde"))
    assert joined.to("cpu").images is joined.images


def test_the_device_normalises_what_was_moved() -> None:
    assert torch.equal(waiting().to("cpu").images, LOOK(PIXELS))
    parts = [part.to("cpu").images for part in waiting().split(2)]
    assert torch.equal(torch.cat(parts), LOOK(PIXELS))
    moved = waiting().to("meta")
    assert (moved.images.dtype, moved.images.device.type, moved.normalization) == (torch.float32, "meta", None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_bytes_become_the_same_floats_on_a_gpu() -> None:
    joined = join_batches([waiting(slice(0, 2)), waiting(slice(2, 5))], pin_memory=True)
    assert (joined.images.dtype, joined.images.is_pinned()) == (torch.uint8, True)
    torch.testing.assert_close(joined.to("cuda", non_blocking=True).images.cpu(), expected(), atol=1e-6, rtol=0)
