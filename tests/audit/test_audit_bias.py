"""Bias of what is missing: DuckDB's counts against numpy and scipy on every value, and Spark against DuckDB."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_spark import TINY_SPARK

from neuclip_scale.audit.addresses import top_level_domain
from neuclip_scale.audit.bias import Bias, measure_bias
from neuclip_scale.audit.bias_categories import CategoryBias
from neuclip_scale.audit.bias_columns import num_words
from neuclip_scale.audit.bias_numbers import PER_MILLE, Histogram, NumberBias, Summary
from neuclip_scale.files import json_ready
from neuclip_scale.queries.engines import Engine, EngineOptions

ibis = pytest.importorskip("ibis", reason="needs the extra `audit`")
stats = pytest.importorskip("scipy.stats", reason="needs the extra `audit`")


@pytest.fixture(scope="module")
def duckdb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """As an audit connects to it."""
    with Engine(EngineOptions(), tmp_path_factory.mktemp("engine")) as engine:
        yield engine._backend


def read(engine: Any, folder: Path, columns: dict[str, Any]) -> Any:
    """The columns as a stored table of an engine."""
    path = folder / f"{len(list(folder.iterdir()))}.parquet"
    pq.write_table(pa.table(columns), path)
    return engine.read_parquet(str(path))


def number_of(bias: Bias, column: str) -> NumberBias:
    return next(found for found in bias.numbers if found.column == column)


def category_of(bias: Bias, column: str) -> CategoryBias:
    return next(found for found in bias.categories if found.column == column)


def reason(bias: Bias, column: str) -> str:
    return next(found.reason for found in bias.left_out if found.column == column)


odd = st.sampled_from([None, math.nan, math.inf, -math.inf, 0.0, -0.0, 1e300, -1e101, 9e99, 1e-300, 5e-324])
number = st.one_of(odd, st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
word = st.sampled_from([None, "", "en", "de", "fr", 'x"; drop', "(other)", "é" * 80])
row = st.tuples(st.booleans(), number, st.integers(-(2**40), 2**40), word)


@settings(
    max_examples=40,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(row, min_size=1, max_size=80), st.sampled_from([1, 3, 10, 10**6]))
def test_every_figure_is_that_of_numpy_and_scipy(
    duckdb: Any, tmp_path: Path, rows: list[tuple[Any, ...]], rows_per_bucket: int
) -> None:
    names = ("kept", 'a "number"', "whole", "word")
    types = (pa.bool_(), pa.float64(), pa.int64(), pa.string())
    columns = {name: pa.array(values, kind) for name, values, kind in zip(names, zip(*rows), types)}
    found = measure_bias(read(duckdb, tmp_path, columns), rows_per_bucket=rows_per_bucket)
    kept = np.array([row[0] for row in rows])
    assert (found.num_kept, found.num_missing) == (kept.sum(), (~kept).sum())
    if kept.all() or not kept.any():
        assert not found.tests
        assert "nothing to compare" in found.sentences()[0]
        return
    for name, place in (('a "number"', 1), ("whole", 2)):
        check_numbers(found, name, [row[place] for row in rows], kept)
    check_words(found, [row[3] for row in rows], kept)
    q_values = stats.false_discovery_control([test.p for test in found.tests]) if found.tests else []
    assert [test.q for test in found.tests] == pytest.approx(list(q_values))
    told = {test.column for test in found.tests} | {column.column for column in found.left_out}
    assert told == set(names[1:])
    json.dumps(json_ready(found.document()), allow_nan=False)


def check_numbers(found: Bias, name: str, values: list[float | None], kept: np.ndarray) -> None:
    given = np.array([value is not None and abs(value) <= 1e100 for value in values])
    numbers = np.array([value if use else 0 for value, use in zip(values, given)], dtype=float)
    a, b = numbers[given & kept], numbers[given & ~kept]
    check_presence(found, name, values, kept)
    if not len(a) or not len(b) or len({*a, *b}) == 1:
        assert name not in [test.column for test in found.numbers]
        assert reason(found, name)
        return
    bias = number_of(found, name)
    expected = stats.ks_2samp(a, b, method="exact")
    assert bias.distance == pytest.approx(expected.statistic, abs=1e-12)
    # scipy's exact p gives up near 1 and takes the approximate one.
    assert bias.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-3 if bias.p > 0.99 else 1e-12)
    check_summary(bias.kept, a)
    check_summary(bias.missing, b)
    if min(len(a), len(b)) < 2:
        assert bias.mean_difference is None
    elif a.std() or b.std():
        pooled = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
        assert bias.mean_difference == pytest.approx((b.mean() - a.mean()) / pooled, rel=1e-6, abs=1e-6)
    check_histogram(bias.histogram, a, b)


def check_summary(summary: Summary, values: np.ndarray) -> None:
    scale = np.abs(values).max()
    assert (summary.n, summary.minimum, summary.maximum) == (len(values), values.min(), values.max())
    assert summary.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9 * scale)
    deviation = None if len(values) == 1 else pytest.approx(values.std(ddof=1), rel=1e-6, abs=1e-7 * scale)
    assert summary.deviation == deviation
    ordered = np.sort(values)
    expected = {f"p{part / 10:g}": ordered[-(-len(values) * part // 1000) - 1] for part in PER_MILLE}
    assert summary.quantiles == expected


def check_histogram(histogram: Histogram, a: np.ndarray, b: np.ndarray) -> None:
    edges = histogram.edges
    assert 2 <= len(edges) <= 41
    assert list(edges) == sorted(set(edges))
    for counts, outside, values in ((histogram.kept, 0, a), (histogram.missing, 1, b)):
        assert histogram.below[outside] == (values < edges[0]).sum()
        assert histogram.above[outside] == (values > edges[-1]).sum()
        assert len(counts) == len(edges) - 1
        inside = values[(values >= edges[0]) & (values <= edges[-1])]
        assert sum(counts) == len(inside)
        # Counts left of each edge; a number within rounding of it may stand on either side.
        margin = 1e-9 * (edges[-1] - edges[0])
        for edge, left in zip(edges[1:], np.cumsum(counts)):
            assert (inside < edge - margin).sum() <= left <= (inside <= edge + margin).sum()
    pooled = np.concatenate([a, b])
    assert sum(histogram.below) <= 0.005 * len(pooled)
    assert sum(histogram.above) <= 0.005 * len(pooled) or len(pooled) > 100


def check_presence(found: Bias, name: str, values: list[float | None], kept: np.ndarray) -> None:
    kinds = [
        "NULL" if v is None else "NaN" if math.isnan(v) else "a" if abs(v) <= 1e100 else "infinite" for v in values
    ]
    table = count_table(kinds, kept)
    tests = [test for test in found.categories if (test.column, test.about) == (name, "presence")]
    assert len(tests) == (len(table) > 1)
    for test in tests:
        assert {row.name.split()[0]: (row.kept, row.missing) for row in test.rows} == table
        check_test(test)


def check_words(found: Bias, values: list[str | None], kept: np.ndarray) -> None:
    table = count_table(["(NULL)" if value is None else value for value in values], kept)
    least = min(kept.sum(), (~kept).sum()) / len(kept)
    frequent = {name: pair for name, pair in table.items() if sum(pair) * least >= 5}
    rest = [sum(pair[side] for name, pair in table.items() if name not in frequent) for side in (0, 1)]
    tests = [test for test in found.categories if test.column == "word"]
    expected = sorted([*frequent.values(), *([tuple(rest)] if any(rest) else [])])
    if len(expected) < 2 or all(value is None for value in values) or not tests:
        assert reason(found, "word")
        assert len(expected) < 2 or "characters on average" in reason(found, "word")
        return
    assert sorted((row.kept, row.missing) for row in tests[0].rows) == expected
    check_test(tests[0])


def check_test(test: CategoryBias) -> None:
    table = np.array([(row.kept, row.missing) for row in test.rows])
    expected = stats.chi2_contingency(table, correction=False)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert test.degrees == expected.dof
    assert test.cramers_v == pytest.approx(stats.contingency.association(table), abs=1e-7)


def count_table(names: list[str], kept: np.ndarray) -> dict[str, tuple[int, int]]:
    found: dict[str, list[int]] = {}
    for name, side in zip(names, kept):
        found.setdefault(name, [0, 0])[0 if side else 1] += 1
    return {name: (pair[0], pair[1]) for name, pair in found.items()}


def test_nan_is_seen_though_the_bounds_of_the_file_leave_it_out(duckdb: Any, tmp_path: Path) -> None:
    for others in ([1.0, 2.0], [5.0, 5.0], [0.0, math.inf]):
        values = [*others, math.nan, math.nan, None, math.nan]
        found = measure_bias(read(duckdb, tmp_path, {"kept": [True, False, True, True, False, False], "x": values}))
        check_presence(found, "x", values, np.array([True, False, True, True, False, False]))


def planted(rows: int = 6000) -> dict[str, Any]:
    """A list whose missing part is known: lower scores, more .ru, fewer long captions, widths that are not given."""
    random = np.random.default_rng(5)
    kept = random.random(rows) > 0.12
    width = [
        None if lost and i % 2 else int(w) for i, (lost, w) in enumerate(zip(~kept, random.integers(90, 4000, rows)))
    ]
    hosts = np.where(random.random(rows) < np.where(kept, 0.1, 0.4), "a.ru", "b.example.com")
    text = [" ".join(["word"] * int(n)) for n in random.integers(1, 20, rows)]
    score = np.round(random.normal(size=rows) - 0.6 * ~kept, 3)
    score[:5] = [math.nan, math.inf, -math.inf, 1e300, 0]
    return {
        "uid": [f"{i:032x}" for i in range(rows)],
        "kept": kept,
        "url": [f"http://{host}/{i}.jpg" for i, host in enumerate(hosts)],
        "text": text,
        "score": score,
        "noise": random.normal(size=rows).astype(np.float32),
        "width": pa.array(width, pa.int32()),
        "flag": random.random(rows) > 0.5,
        "language": np.array(["en", "de", "fr", None])[random.integers(0, 4, rows)],
        "domain": [f"host{min(int(n), 900)}" for n in random.pareto(1.0, rows) * 10],
        "constant": np.ones(rows),
        "nothing": pa.array([None] * rows, pa.float64()),
        "only kept": [1.5 + i % 3 if k else None for i, k in enumerate(kept)],
        "mirror": [f"https://cdn.example.org/{'x' * 60}/{i}" for i in range(rows)],
        "name": [f"n{i}" for i in range(rows)],
        "boxes": [[i] for i in range(rows)],
    }


@pytest.fixture(scope="module")
def found(duckdb: Any, tmp_path_factory: pytest.TempPathFactory) -> Bias:
    return measure_bias(read(duckdb, tmp_path_factory.mktemp("planted"), planted()))


def test_what_was_planted_is_found_and_nothing_else(found: Bias) -> None:
    differing = {(test.column, type(test).__name__) for test in found.differing()}
    assert differing == {
        ("score", "NumberBias"), ("width", "CategoryBias"), ("only kept", "CategoryBias"),
        ("top-level domain", "CategoryBias"),
    }  # fmt: skip
    score = number_of(found, "score")
    assert score.mean_difference == pytest.approx(-0.6, abs=0.08)
    assert (score.size, score.shape) == ("medium", "medium")
    domain = category_of(found, "top-level domain")
    assert domain.largest_residuals(1)[0].residual > 10 or domain.largest_residuals(1)[0].name == "com"
    assert domain.size == "medium"
    assert domain.cramers_v < domain.balanced_v, "few are missing, which makes V itself small"
    assert any(text.startswith("score: mean -0.5") for text in found.sentences())


def test_what_is_left_out_is_said_with_the_reason(found: Bias) -> None:
    reasons = {column.column: column.reason for column in found.left_out}
    assert reasons.keys() == {"uid", "url", "text", "constant", "nothing", "only kept", "mirror", "name", "boxes"}
    assert reasons["constant"] == "every number is 1"
    assert reasons["nothing"] == "has no number"
    assert reasons["only kept"] == "has numbers on one side only"
    assert "characters on average" in reasons["mirror"]
    assert "no categories" in reasons["name"]
    assert "array<int64>" in reasons["boxes"]


def test_at_most_fifty_categories_and_the_rest_pooled(found: Bias) -> None:
    rows = category_of(found, "domain").rows
    assert len(rows) <= 52
    assert rows[-1].name == "(other)"
    assert sum(row.kept + row.missing for row in rows) == found.num_kept + found.num_missing


def test_the_size_of_the_sorted_parts_changes_nothing(duckdb: Any, tmp_path: Path, found: Bias) -> None:
    again = measure_bias(read(duckdb, tmp_path, planted()), rows_per_bucket=500)
    assert_alike(found.document(), again.document())


def test_wrong_tables_are_refused(duckdb: Any, tmp_path: Path) -> None:
    table = read(duckdb, tmp_path, {"kept": [True, None], "x": [1, 2]})
    with pytest.raises(ValueError, match="NULL in 1 rows"):
        measure_bias(table)
    with pytest.raises(ValueError, match="no boolean column of the table; it has kept, x"):
        measure_bias(table, "x")
    with pytest.raises(ValueError, match="no boolean column"):
        measure_bias(table, "absent")


def test_columns_are_left_out_as_asked(duckdb: Any, tmp_path: Path) -> None:
    table = read(duckdb, tmp_path, {"kept": [True, False] * 40, "x": list(range(80)), "y": list(range(80))})
    assert [test.column for test in measure_bias(table, leave_out=["x"]).numbers] == ["y"]
    assert number_of(measure_bias(table), "x").q >= number_of(measure_bias(table), "x").p


URLS = {
    "http://a.example.CO.UK/x.jpg": "uk",
    "https://user:pw@host.de:8080/?q=http://b.com": "de",
    "HTTP://TRAILING.fr./": "fr",
    "http://a.com#x@b.ru": "com",
    "http://a.com\\@b.ru/": "com",
    "http://1.2.3.4/a.jpg": "(IP address)",
    "http://[2001:db8::1]:80/a.jpg": "(IP address)",
    "http://localhost/a": "localhost",
    "no address": "(none)",
    "": "(none)",
    None: None,
}
TEXTS = {"": 0, "  ": 0, "one": 1, " two  words ": 2, "a\tb\nc\x0bd\x0ce\rf": 6, "日本語 です": 2, None: None}


def derived(table: Any) -> tuple[list[Any], list[Any]]:
    asked = table.select(n=table.n, domain=top_level_domain(table.url), words=num_words(table.text)).order_by("n")
    rows = asked.to_pyarrow().to_pylist()
    return [row["domain"] for row in rows], [row["words"] for row in rows]


def derived_table() -> dict[str, Any]:
    texts = [*TEXTS, *[None] * (len(URLS) - len(TEXTS))]
    return {"n": list(range(len(URLS))), "url": list(URLS), "text": texts}


def test_domains_and_words(duckdb: Any, tmp_path: Path) -> None:
    domains, words = derived(read(duckdb, tmp_path, derived_table()))
    assert domains == list(URLS.values())
    assert words[: len(TEXTS)] == list(TEXTS.values())


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    pyspark = pytest.importorskip("pyspark.sql", reason="needs the extra `spark`")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        builder = pyspark.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
        for setting in (*TINY_SPARK, "spark.sql.shuffle.partitions=1", "spark.sql.codegen.factoryMode=NO_CODEGEN"):
            builder = builder.config(*setting.split("=", 1))
        session = builder.getOrCreate()
        yield ibis.pyspark.connect(session)
        session.stop()


@pytest.mark.slow
def test_spark_says_the_same(duckdb: Any, spark: Any, tmp_path: Path) -> None:
    names = ("uid", "kept", "url", "text", "score", "width", "language", "domain", "nothing", "only kept", "boxes")
    columns = {name: values for name, values in planted(1500).items() if name in names}
    there, here = (read(engine, tmp_path, columns) for engine in (spark, duckdb))
    assert_alike(measure_bias(here).document(), measure_bias(there, rows_per_bucket=500).document())
    domains, words = derived(read(spark, tmp_path, derived_table()))
    assert domains == list(URLS.values())
    assert [None if word is None or math.isnan(word) else word for word in words[: len(TEXTS)]] == list(TEXTS.values())


def assert_alike(left: Any, right: Any, where: str = "") -> None:
    """Two documents are equal but for the rounding of sums."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_alike(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for place, (a, b) in enumerate(zip(left, right)):
            assert_alike(a, b, f"{where}/{place}")
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-9, abs=1e-12), where
    else:
        assert left == right, where
