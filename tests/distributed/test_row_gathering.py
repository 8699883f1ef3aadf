"""Rows that are gathered part by part, while others are made."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.distributed import RowGathering

pytestmark = pytest.mark.distributed

PARTS = ([7], [3, 3, 1], [1, 6], [2, 2, 2, 1])


def gathered(dtype: torch.dtype, shape: tuple[int, ...]) -> list[bool]:
    """Of each way to cut 7 rows, whether they are those of one gathering of all, to the bit."""
    generator = torch.Generator().manual_seed(distributed.rank())
    same = []
    for parts in PARTS:
        rows = torch.randn(7, *shape, generator=generator, dtype=torch.float64).to(dtype)
        gathering = RowGathering(7)
        for part in rows.split(parts):
            gathering.add(part)
        result = gathering.result(rows)
        same.append(torch.equal(result, distributed.all_gather_rows(rows)) and result.is_contiguous())
    return same


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_make_the_whole(world_size: int) -> None:
    for dtype, shape in ((torch.float32, (5,)), (torch.int64, ())):
        assert run_ranks(world_size, gathered, dtype, shape) == [[True] * len(PARTS)] * world_size


def second_rank_comes_late() -> bool:
    """Rank 1 brings its part only after rank 0 has gone on: were that to wait for it, neither would come back."""
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=30))
    rows = torch.full((4, 3), float(distributed.rank()))
    gathering = RowGathering(4)
    if distributed.is_main():
        gathering.add(rows[:2])
        store.set("rank 0 encodes the next", "")
    else:
        store.wait(["rank 0 encodes the next"])
        gathering.add(rows[:2])
    gathering.add(rows[2:])
    return torch.equal(gathering.result(rows), distributed.all_gather_rows(rows))


def test_nobody_waits_while_a_part_travels() -> None:
    assert run_ranks(2, second_rank_comes_late) == [True, True]


def test_missing_rows_are_noticed() -> None:
    assert all(run_ranks(2, too_few))


def too_few() -> bool:
    gathering = RowGathering(3)
    gathering.add(torch.ones(2, 2))
    try:
        gathering.result(torch.ones(3, 2))
    except AssertionError as error:
        return "missing" in str(error)
    return False


def exchanged() -> list[int]:
    """Rows that tell who made them, and for whom."""
    world, rank = distributed.world_size(), distributed.rank()
    rows = torch.arange(2 * world)[:, None] + torch.tensor([100 * rank, 1000])
    return [int(value) for value in distributed.exchange_rows(rows).flatten()]


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_what_all_have_for_its_rows(world_size: int) -> None:
    expected = [
        [
            value
            for sender in range(world_size)
            for row in range(2 * rank, 2 * rank + 2)
            for value in (row + 100 * sender, row + 1000)
        ]
        for rank in range(world_size)
    ]
    assert run_ranks(world_size, exchanged) == expected
