"""Engines give what the rows are, whatever a file's statistics say of them."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuclip_scale.queries.engines import Engine, EngineOptions
from neuclip_scale.queries.errors import QueryError, UsageError


def test_nan_is_seen_although_statistics_leave_it_out(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"score": [0.1, math.nan, 0.3, math.nan, None]}), path)
    assert pq.read_metadata(path).row_group(0).column(0).statistics.max == 0.3
    with Engine(EngineOptions(), tmp_path / "work") as engine:
        table = engine.parquet([path])
        known = table.filter(table.score.notnull() & ~table.score.isnan())
        assert engine.rows(known.agg(count=known.count(), high=known.score.max())) == [{"count": 2, "high": 0.3}]
        low = table.filter(table.score <= 0.3)
        assert engine.rows(low.agg(count=low.count())) == [{"count": 2}]


def test_what_an_engine_refuses_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing more")
    with Engine(EngineOptions(), tmp_path / "work") as engine, pytest.raises(QueryError, match="duckdb: "):
        engine.parquet([broken])
    with pytest.raises(UsageError, match="--memory-limit 'much'"):
        Engine(EngineOptions(memory_limit="much"), tmp_path / "work")
    with pytest.raises(UsageError, match="give KEY=VALUE"):
        Engine(EngineOptions(spark_conf=("nothing",)), tmp_path / "work")


def test_a_text_that_is_no_utf8_is_told_with_its_file_and_what_to_do(tmp_path: Path) -> None:
    path, texts = tmp_path / "list.parquet", [b"coffee", b"caf\xe9"]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}), path)
    with Engine(EngineOptions(), tmp_path / "work") as engine:
        with pytest.raises(QueryError, match=r"list\.parquet.*xE9.*bytes replaced"):
            engine.rows(engine.parquet([path]))
        read = pq.read_table(path)["text"].cast(pa.binary()).to_pylist()
        pq.write_table(pa.table({"text": [text.decode("utf-8", "replace") for text in read]}), path)
        assert engine.rows(engine.parquet([path])) == [{"text": "coffee"}, {"text": "caf\ufffd"}]
