"""The whole audit on a real Spark cluster of two executors, against DuckDB: one digest, equal lists."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from planted_world import PlantedWorld
from tiny_spark import TINY_SPARK


def audit(world: PlantedWorld, output: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "neuclip_scale", "audit", "--manifest", str(world.published), "-j", "1"]
    command += [f"--download={download.folder}" for download in (world.first, world.second)]
    done = subprocess.run([*command, "--output", str(output), *more], capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stderr[-3000:]
    return dict(json.loads((output / "audit.json").read_bytes()))


@pytest.mark.long
def test_spark_and_duckdb_report_the_same(two_downloads: PlantedWorld, tmp_path: Path) -> None:
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("needs the extra `spark`")
    if shutil.which("java") is None:
        pytest.skip("no java on PATH")
    settings = [f"--spark-conf={setting}" for setting in (*TINY_SPARK, "spark.sql.shuffle.partitions=2")]
    spark = ["--engine", "spark", "--master", "local-cluster[2,1,1024]", *settings]
    found = audit(two_downloads, tmp_path / "spark", *spark)
    expected = audit(two_downloads, tmp_path / "duckdb")
    assert found["engine"] == "spark"
    assert found["digest"] == expected["digest"]
    assert found["lists"] == expected["lists"]
    for name, rows in expected["lists"].items():
        tables = [pq.read_table(tmp_path / engine / "lists" / f"{name}.parquet") for engine in ("spark", "duckdb")]
        assert tables[0].to_pylist() == tables[1].to_pylist()
        assert len(tables[0]) == rows
        one, other = ((tmp_path / engine / "lists" / f"{name}.npy").read_bytes() for engine in ("spark", "duckdb"))
        assert one == other
