"""Chunks cover all similarities once, and what is counted inside one fits 32 bits however large the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuclip_scale.similarity.chunks import ChunkLimits, chunks, num_splits


@given(
    world=st.integers(1, 60), first=st.integers(0, 59), count=st.integers(1, 60),
    height=st.integers(1, 70), width=st.integers(1, 70),
)  # fmt: skip
def test_every_entry_once_and_every_positive_pair(world: int, first: int, count: int, height: int, width: int) -> None:
    offset = min(first, world - 1)
    num_left = min(count, world - offset)
    seen = torch.zeros(num_left, world, dtype=torch.int64)
    positive = torch.zeros(num_left, world, dtype=torch.bool)
    for chunk in chunks(num_left, world, offset=offset, height=height, width=width):
        seen[chunk.rows, chunk.columns] += 1
        part = positive[chunk.rows, chunk.columns]
        rows = torch.arange(part.shape[0])
        here = (rows + chunk.diagonal >= 0) & (rows + chunk.diagonal < part.shape[1])
        part[rows[here], rows[here] + chunk.diagonal] = True
    assert bool((seen == 1).all())
    assert torch.equal(positive.nonzero(), torch.stack([torch.arange(num_left), torch.arange(num_left) + offset], 1))


@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize(("num_left", "world", "offset"), [(100_000, 100_000, 0), (9_000, 2**23 + 77, 2**23 - 9_000)])
def test_indices_inside_a_chunk_stay_below_2_to_the_31(num_left: int, world: int, offset: int, item_size: int) -> None:
    """b B is 1e10 and 7.5e10 here. The kernels' largest index is into features or weights."""
    assert num_left * world > 1 << 32
    limits, widest = ChunkLimits(), 4096
    width = limits.weight_columns(num_left, item_size)
    sizes = [(limits.edge, limits.edge), (limits.height, width)]
    for height, width in sizes:
        positives = 0
        for chunk in chunks(num_left, world, offset=offset, height=height, width=width):
            rows, columns = (side.stop - side.start for side in chunk[:2])
            assert rows * columns < 1 << 31
            assert max(rows, columns) * widest < 1 << 31
            assert -rows < chunk.diagonal <= columns
            first, last = max(0, -chunk.diagonal), min(rows, columns - chunk.diagonal)
            if last > first:
                assert chunk.rows.start + first + offset == chunk.columns.start + first + chunk.diagonal
                positives += last - first
        assert positives == num_left
    rows = min(limits.height, num_left)
    assert rows * min(sizes[1][1], world) * item_size <= limits.weight_bytes


def test_offsets_beyond_2_to_the_31_leave_small_diagonals() -> None:
    """Rows of a rank far inside a world of 10^10 pairs, near and far from their positives; nothing is allocated."""
    world, offset, height, width = 10**10, 7 * 10**9 + 3, 4096, 2**31
    found = list(chunks(3, world, offset=offset, height=height, width=width))
    assert [chunk.diagonal for chunk in found] == [
        offset - start if start <= offset < start + width else min(width, world - start)
        for start in range(0, world, width)
    ]
    assert sum(chunk.diagonal < chunk.columns.stop - chunk.columns.start for chunk in found) == 1


@pytest.mark.parametrize(("rows", "item_size"), [(1, 2), (5, 4), (300, 2), (4096, 2), (4096, 4), (100_000, 2)])
def test_a_chunk_of_weights_fits_its_memory(rows: int, item_size: int) -> None:
    limits = ChunkLimits()
    columns = limits.weight_columns(rows, item_size)
    assert columns % 128 == 0
    assert limits.weight_bytes // 2 < min(rows, limits.height) * columns * item_size <= limits.weight_bytes


def test_narrow_outputs_divide_their_sums() -> None:
    assert num_splits(num_tiles=128, depth=8192, least_depth=1024) == 1
    assert num_splits(num_tiles=32, depth=8192, least_depth=1024) == 4
    assert num_splits(num_tiles=4, depth=65536, least_depth=1024) == 16
    assert num_splits(num_tiles=4, depth=3000, least_depth=1024) == 2
    assert num_splits(num_tiles=4, depth=100, least_depth=1024) == 1
    assert num_splits(num_tiles=1000, depth=65536, least_depth=1024) == 1
