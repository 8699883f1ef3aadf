from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.data.manifest import Manifest, ManifestError, ShardEntry
from neuclip_scale.data.streams import StreamOrder, seeded_permutation


def manifest_of(sizes: list[int]) -> Manifest:
    first = np.cumsum([0, *sizes]).tolist()
    return Manifest(tuple(ShardEntry(f"{i}.tar", size, 0, 0, first[i]) for i, size in enumerate(sizes)))


cases = st.tuples(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(-(1 << 63), 1 << 63),
).filter(lambda case: sum(case[0]) >= case[1])


@settings(deadline=None)
@given(cases)
def test_every_epoch_takes_every_sample_once(case: tuple[list[int], int, int, int]) -> None:
    sizes, num_streams, window, seed = case
    order = StreamOrder(manifest_of(sizes), num_streams=num_streams, shuffle_window=window, seed=seed)
    lengths = [order.length(stream) for stream in range(num_streams)]
    assert max(lengths) - min(lengths) <= 1
    walks = [order.walk(stream) for stream in range(num_streams)]
    for _ in range(3):
        epoch = [list(islice(walk, length)) for walk, length in zip(walks, lengths, strict=True)]
        assert sorted(index for part in epoch for index in part) == list(range(sum(sizes)))


@settings(deadline=None)
@given(cases, st.integers(0, 500))
def test_any_position_is_found_directly(case: tuple[list[int], int, int, int], position: int) -> None:
    sizes, num_streams, window, seed = case
    order = StreamOrder(manifest_of(sizes), num_streams=num_streams, shuffle_window=window, seed=seed)
    stream = position % num_streams
    direct = list(islice(order.walk(stream, position), 20))
    assert direct == list(islice(order.walk(stream), position, position + 20))
    assert order.epoch_of(stream, position) == position // order.length(stream)


def test_samples_move_between_streams_and_windows_are_local() -> None:
    order = StreamOrder(manifest_of([100] * 20), num_streams=4, shuffle_window=50, seed=0)
    epochs = [list(islice(order.walk(1, epoch * 500), 500)) for epoch in range(4)]
    assert len({frozenset(epoch) for epoch in epochs}) == 4
    for start in range(0, 500, 50):  # 50 consecutive samples of one shard, out of order
        window = epochs[0][start : start + 50]
        assert len({index // 100 for index in window}) == 1
        assert window != sorted(window)
    other = StreamOrder(manifest_of([100] * 20), num_streams=4, shuffle_window=50, seed=1)
    assert list(islice(other.walk(1), 500)) != epochs[0]


def test_the_order_itself_never_changes() -> None:
    """Golden values: a change here makes every checkpoint resume at other samples."""
    assert seeded_permutation(10, 1, 2, 3).tolist() == GOLDEN_PERMUTATION
    order = StreamOrder(manifest_of([5, 0, 9, 3, 7]), num_streams=3, shuffle_window=4, seed=42)
    assert list(islice(order.walk(1), 16)) == GOLDEN_STREAM


GOLDEN_PERMUTATION = [8, 1, 9, 3, 7, 5, 2, 0, 4, 6]
GOLDEN_STREAM = [22, 23, 5, 6, 7, 9, 10, 8, 23, 22, 20, 21, 6, 7, 5, 8]


def test_fewer_samples_than_streams_is_an_error() -> None:
    with pytest.raises(ManifestError, match="num_streams = 5"):
        StreamOrder(manifest_of([2, 2]), num_streams=5, shuffle_window=4, seed=0)
