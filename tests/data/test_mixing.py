"""Weighted sources and draws with replacement: in proportion, and found at any position without walking there."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.config import ConfigError, DataConfig
from neuclip_scale.data.manifest import Manifest, ManifestError, ShardEntry
from neuclip_scale.data.mixing import BLOCK, MixedOrder, create_order


def manifest_of(sources: list[list[int]]) -> Manifest:
    rows = [(size, source) for source, sizes in enumerate(sources) for size in sizes]
    first = np.cumsum([0, *(size for size, _ in rows)]).tolist()
    return Manifest(
        tuple(ShardEntry(f"{i}.tar", size, 0, 0, first[i], source=source) for i, (size, source) in enumerate(rows))
    )


def order_of(sources: list[list[int]], weights: list[float], *, seed: int = 0, **options: object) -> MixedOrder:
    section = DataConfig(num_streams=2, shuffle_window=7, weights=tuple(weights), **options)
    order = create_order(manifest_of(sources), section, seed)
    assert isinstance(order, MixedOrder)
    return order


shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda s: sum(s) >= 2)
sources = st.lists(shard_sizes, min_size=1, max_size=4)
mixtures = sources.flatmap(
    lambda s: st.tuples(st.just(s), st.lists(st.floats(0.1, 10), min_size=len(s), max_size=len(s)))
)


@settings(deadline=None, max_examples=30)
@given(mixtures, st.integers(0, 2 * BLOCK), st.booleans(), st.integers(0, 1 << 40))
def test_any_position_is_found_directly(
    mixture: tuple[list[list[int]], list[float]], position: int, replacement: bool, seed: int
) -> None:
    order = order_of(*mixture, seed=seed, replacement=replacement)
    direct = list(islice(order.walk(1, position), 30))
    assert direct == list(islice(order.walk(1), position, position + 30))
    assert sum(order.taken(1, position)) == position


@settings(deadline=None, max_examples=10)
@given(mixtures, st.integers(0, 1 << 40))
def test_each_source_keeps_its_own_order_and_its_share(mixture: tuple[list[list[int]], list[float]], seed: int) -> None:
    shards, weights = mixture
    order, manifest = order_of(shards, weights, seed=seed), manifest_of(shards)
    drawn = list(islice(order.walk(0), 3 * BLOCK))
    source_of = [manifest.shards[manifest.locate(index)[0]].source for index in range(manifest.num_samples)]
    for source, weight in enumerate(weights):
        mine = [index for index in drawn if source_of[index] == source]
        assert mine == list(islice(order._orders[source].walk(0), len(mine)))
        assert abs(len(mine) - 3 * BLOCK * weight / sum(weights)) <= 2
    assert order.taken(0, 3 * BLOCK) == [Counter(source_of[i] for i in drawn)[s] for s in range(len(shards))]


def test_what_is_read_of_each_source_is_told() -> None:
    order = order_of([[5, 5], [20]], [3, 1])
    assert order.samples_of_each == [10, 20]
    assert order.read_of_each([BLOCK, BLOCK]) == [2 * BLOCK * 3 // 4, 2 * BLOCK // 4]


def test_with_replacement_every_sample_is_equally_likely_and_windows_are_local() -> None:
    section = DataConfig(num_streams=2, shuffle_window=10, replacement=True)
    order = create_order(manifest_of([[30, 7, 13]]), section, seed=3)
    assert not order.whole_epochs
    counts = Counter(islice(order.walk(0), 100_000))
    assert len(counts) == 50
    # A window brings each sample with probability 1/5: 2000 +- 40 of 10,000 windows.
    assert all(abs(count - 2000) < 200 for count in counts.values())
    window = list(islice(order.walk(1), 10))
    first = next(i for i in range(50) if sorted(window) == sorted((i + k) % 50 for k in range(10)))
    assert window != [(first + k) % 50 for k in range(10)]
    assert list(islice(order.walk(1, 1_000_003), 5)) == list(islice(order.walk(1, 999_995), 8, 13))


def test_a_share_too_small_and_a_source_too_small_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"source 2 has less than 1/2048"):
        order_of([[5], [5]], [1, 1e-4])
    with pytest.raises(ManifestError, match=r"source 2 of data.train has only 1 sample"):
        order_of([[5], [1]], [1, 1])


def test_the_mixture_itself_never_changes() -> None:
    """Golden values: a change here makes every checkpoint of a mixed run resume at other samples."""
    assert list(islice(order_of([[5, 4], [6]], [2, 1], seed=42).walk(1), 16)) == GOLDEN


GOLDEN = [0, 12, 14, 4, 13, 1, 2, 12, 3, 7, 13, 14, 14, 8, 6, 4]
