"""The exact top fraction: any scores, ties, NaN, repeated uids; on DuckDB and on a real Spark."""

from __future__ import annotations

import importlib.util
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subset_helpers import row_of, select, uid_of, uids, write_pool
from tiny_spark import TINY_SPARK

from neuclip_scale.queries.engines import Engine, EngineOptions
from neuclip_scale.subset import ClipScoreFilter, Columns
from neuclip_scale.subset.cuts import FEW, Cut, find_cut

SCORES = st.lists(
    st.one_of(
        st.none(),
        st.floats(),
        st.sampled_from([0.0, -0.0, 0.25, 0.25, 0.3, 5e-324, 1e-320, -1e308, 1e308, math.inf, -math.inf, math.nan]),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(EngineOptions(num_threads=1), tmp_path_factory.mktemp("engine")) as found:
        yield found


def write_scores(path: Path, scores: Any, names: Any, kind: Any = None) -> Path:
    table = {"uid": pa.array(names, pa.string()), "clip_l14_similarity_score": pa.array(scores, kind or pa.float64())}
    pq.write_table(pa.table(table), path)
    return path


def top(scores: list[float | None], names: list[str], fraction: float, ties: str) -> set[str]:
    """By sorting everything."""
    # Beyond 1e300 all are one; no score of a model is.
    known = [(max(-1e300, min(1e300, s)), name) for s, name in zip(scores, names) if s is not None and s == s]
    known.sort(key=lambda pair: (-pair[0], pair[1]))
    count = int(len(scores) * fraction)
    if ties == "uid":
        return {name for _, name in known[:count]}
    if count >= len(known):
        return {name for _, name in known}
    return {name for score, name in known if score >= known[count][0]}


def kept(cut: Cut, scores: list[float | None], names: list[str]) -> set[str]:
    clipped = np.clip([math.nan if score is None else score for score in scores], -1e300, 1e300)
    return {
        name
        for score, name in zip(clipped, names)
        if score > cut.threshold or (score == cut.threshold and (cut.last_uid is None or name <= cut.last_uid))
    }


@settings(max_examples=40, deadline=None)
@given(SCORES, st.sampled_from([0.001, 0.1, 0.3, 0.5, 0.999, 1.0]), st.sampled_from(["uid", "all"]))
def test_any_scores(engine: Engine, scores: list[float | None], fraction: float, ties: Any) -> None:
    names = [uid_of(number) for number in range(len(scores))]
    with tempfile.TemporaryDirectory() as folder:
        path = write_scores(Path(folder) / "0.parquet", scores, names)
        cut = find_cut(engine, [path], ClipScoreFilter("l14", fraction, ties=ties), Columns())
    assert kept(cut, scores, names) == top(scores, names, fraction, ties)
    assert cut.num_rows == len(scores)
    if ties == "uid":
        assert len(kept(cut, scores, names)) == min(cut.num_wanted, cut.num_scored)


@pytest.mark.parametrize("kind", ["normal", "float32", "few values", "one value", "geometric", "integers"])
@pytest.mark.parametrize("ties", ["uid", "all"])
def test_many_scores_take_several_histograms(engine: Engine, tmp_path: Path, kind: str, ties: Any) -> None:
    random, count = np.random.default_rng(0), 5 * FEW
    scores = {
        "normal": random.normal(0.2, 0.05, count),
        "float32": random.normal(0.2, 0.05, count).astype(np.float32),
        "few values": random.integers(0, 7, count) / 7,
        "one value": np.full(count, 0.25),
        "geometric": 10.0 ** -random.integers(0, 300, count),
        "integers": random.integers(-(2**62), 2**62, count),
    }[kind]
    names = [uid_of(number) for number in range(count)]
    paths = [
        write_scores(tmp_path / f"{part}.parquet", scores[part::2], names[part::2], pa.from_numpy_dtype(scores.dtype))
        for part in range(2)
    ]
    found = scores.astype(np.float64).tolist()
    for fraction in (0.0003, 0.3):
        cut = find_cut(engine, paths, ClipScoreFilter("l14", fraction, ties=ties), Columns())
        assert kept(cut, found, names) == top(found, names, fraction, ties)


def test_a_selection_keeps_the_exact_share(tmp_path: Path) -> None:
    """Through the workers: ties by uid in any writing of it, NaN and null count as rows and are never kept."""
    scores = [0.9, math.nan, 0.5, 0.5, 0.5, 0.5, None, 0.1, 0.1, 0.1]
    names = ["f" * 32, "1" * 32, "B" * 32, "a" * 32, "C" * 32, "0" * 31 + "d", "2" * 32, "3" * 32, "4" * 32, "5" * 32]
    found = [row_of(n, uid=u, clip_l14_similarity_score=s) for n, (u, s) in enumerate(zip(names, scores))]
    found[5]["uid"] = "d".rjust(25, "0")  # lost leading zeros
    pool = write_pool(tmp_path / "pool", [found[:4], found[4:]])
    made = select(pool, tmp_path / "uid.npy", ClipScoreFilter("l14", 0.3))
    assert uids(tmp_path / "uid.npy") == ["0" * 31 + "d", "a" * 32, "f" * 32]
    cut = made.filters[0].cut
    assert cut is not None
    assert (cut.num_rows, cut.num_scored, cut.num_above, cut.num_equal, cut.num_wanted) == (10, 8, 1, 4, 3)
    select(pool, tmp_path / "all.npy", ClipScoreFilter("l14", 0.3, ties="all"))
    assert len(uids(tmp_path / "all.npy")) == 5
    select(pool, tmp_path / "most.npy", ClipScoreFilter("l14", 1.0))
    assert len(uids(tmp_path / "most.npy")) == 8


def test_the_share_is_of_the_whole_pool_whatever_else_is_asked(tmp_path: Path) -> None:
    found = [row_of(number, original_width=400 if number % 2 else 1) for number in range(100)]
    pool = write_pool(tmp_path / "pool", [found])
    from neuclip_scale.subset import BasicFilter

    made = select(pool, tmp_path / "out.npy", BasicFilter(), ClipScoreFilter("b32", 0.1))
    assert [each.passed for each in made.filters] == [10, 5]


@pytest.mark.slow
def test_spark_finds_the_same_cut(engine: Engine, tmp_path: Path) -> None:
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("needs the extra `spark`")
    if shutil.which("java") is None:
        pytest.skip("no java on PATH")
    random, count = np.random.default_rng(1), FEW + 99
    scores = np.where(np.arange(count) % 100 == 7, np.nan, np.round(random.normal(0.2, 0.05, count), 3)).tolist()
    names = [uid_of(number).upper() for number in range(count)]
    path = write_scores(tmp_path / "0.parquet", scores, names)
    plain = ("spark.sql.shuffle.partitions=1", *TINY_SPARK)
    each = ClipScoreFilter("l14", 0.3)
    with Engine(EngineOptions("spark", master="local[1]", spark_conf=plain), tmp_path / "spark") as spark:
        found = find_cut(spark, [path], each, Columns())
    assert found == find_cut(engine, [path], each, Columns())
    assert found.last_uid is not None
