"""Where queries run: DuckDB inside this process, or Spark. Both read and write parquet files.

The queries themselves are written once, with Ibis.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from neuclip_scale.files import atomic_file
from neuclip_scale.queries.errors import QueryError, UsageError

_EXTRAS = {"duckdb": "audit", "spark": "spark"}
_ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class EngineOptions:
    """Which engine, and what it may take of the machine."""

    engine: Literal["duckdb", "spark"] = "duckdb"
    """Where the queries run."""
    memory_limit: str = "4GB"
    """Of DuckDB, which writes to the output's disk what does not fit; of Spark's driver."""
    num_threads: int = 0
    """Of DuckDB; 0 takes every core."""
    master: str = "local[*]"
    """Of Spark: local[N], spark://HOST:7077, yarn, k8s://..."""
    spark_conf: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Settings of Spark, as spark.sql.shuffle.partitions=2000."""

    def check(self) -> None:
        """Raise `UsageError` for settings that are none."""
        if self.num_threads < 0:
            raise UsageError(f"--num-threads {self.num_threads}: give a number of threads, or 0 for every core.")
        wrong = [text for text in self.spark_conf if not text.partition("=")[2]]
        if wrong:
            raise UsageError(f"--spark-conf {wrong[0]!r}: give KEY=VALUE, as spark.sql.shuffle.partitions=2000.")


class Engine:
    """An open connection; the same queries give the same rows on any."""

    def __init__(self, options: EngineOptions, folder: Path) -> None:
        """Connect; what does not fit in memory goes to a folder of its own in `folder`, removed at the end.

        Raises `QueryError`, `UsageError`.
        """
        options.check()
        self.name = options.engine
        scratch, self._lock = _new_scratch(folder)
        try:
            import_module("ibis")
            self._backend: Any = _duckdb(options, scratch) if options.engine == "duckdb" else _spark(options, scratch)
        except ImportError as error:
            extra = _EXTRAS[options.engine]
            raise QueryError(
                f"this needs the extra `{extra}`: pip install 'neuclip-scale[{extra}]' ({error})"
            ) from error
        self._scratch = scratch
        self._num_views = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.disconnect()
        shutil.rmtree(self._scratch, ignore_errors=True)
        os.close(self._lock)

    def parquet(self, files: Sequence[Path | str], *, types_differ: bool = False) -> Any:
        """An `ibis.Table` over parquet files of one schema.

        Where `types_differ`, a column's type is one that holds those of all files, as of whole and other numbers, which
        takes reading every footer for each query; otherwise the first file's decide. Spark refuses such files.
        """
        paths = [str(file) for file in files]
        with self.told():
            if self.name == "duckdb":
                # A folder named key=value is no column of the files in it.
                return self._backend.read_parquet(paths, union_by_name=types_differ, hive_partitioning=False)
            self._num_views += 1
            name = f"neuclip_{self._num_views}"
            # Ibis hands a list over as one path.
            self._backend._session.read.parquet(*map(_literally, paths)).createOrReplaceTempView(name)
            return self._backend.table(name)

    def rows(self, query: Any) -> list[dict[str, Any]]:
        """A small result, as dicts."""
        with self.told():
            found: list[dict[str, Any]] = self._backend.to_pyarrow(query).to_pylist()
        return found

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn an error of the engine inside the block into one for people."""
        try:
            yield
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("_duckdb", "duckdb", "pyspark", "py4j", "ibis"):
                raise
            first = str(error).strip().split("\n")[0][:300]
            if "No space left" in first or "max_temp_directory_size" in str(error):
                raise QueryError(f"{self.name}: {first}. Make room there, and run the same command again.") from error
            if "Out of Memory" in first:
                raise QueryError(f"--memory-limit: {first}. Give more.") from error
            if "not valid UTF8" in first:
                remedy = "Write that file again with such bytes replaced (pyarrow reads them, cast to binary)"
                raise QueryError(f"{self.name}: {first} {remedy}, or without that column.") from error
            raise QueryError(f"{self.name}: {first}. Check the columns, or report this.") from error

    def save(self, query: Any, path: Path) -> int:
        """Write a result of any size as one parquet file, atomically; returns its number of rows."""
        import pyarrow.parquet as pq

        path.parent.mkdir(parents=True, exist_ok=True)
        parts = self._scratch / f"{path.stem}.parts"
        shutil.rmtree(parts, ignore_errors=True)
        try:
            with self.told():
                if self.name == "duckdb":
                    parts.mkdir()
                    # Ibis' own to_parquet quotes a path as Python does, not as SQL.
                    target = str(parts / "0.parquet").replace("'", "''")
                    statement = f"COPY ({self._backend.compile(query)}) TO '{target}' (FORMAT parquet)"
                    self._backend.raw_sql(statement).fetchall()
                else:
                    self._backend.to_parquet(query, str(parts))  # a folder: a file for each of Spark's partitions
            files = sorted(parts.glob("*.parquet"))
            if len(files) == 1:
                _move(files[0], path)
                return int(pq.read_metadata(path).num_rows)
            return _join(files, path)
        finally:
            shutil.rmtree(parts, ignore_errors=True)


def _new_scratch(folder: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock, which ends with the process. Removes what killed processes left."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".scratch-*"):
        with suppress(OSError), open(left / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where its process lives
            shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".scratch-", dir=folder))
    new = scratch / "lock.new"  # gets its name once it is locked, so that nobody else finds it free
    descriptor = os.open(new, os.O_CREAT | os.O_RDWR)
    with suppress(OSError):  # where a filesystem knows no locks, nobody removes anything
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(scratch / "lock")
    return scratch, descriptor


def batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The columns of a parquet file as pyarrow record batches, some megabytes at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as parquet:
        yield from parquet.iter_batches(_ROWS_AT_ONCE, columns=list(columns))


def _literally(path: str) -> str:
    """A path in which Hadoop sees no pattern."""
    return re.sub(r"([][{}*?^\\])", r"\\\1", path)


def _move(source: Path, path: Path) -> None:
    with open(source, "rb") as stream, atomic_file(path) as file:
        shutil.copyfileobj(stream, file, 16 << 20)


def _join(files: Sequence[Path], path: Path) -> int:
    import pyarrow.parquet as pq

    num_rows = 0
    with atomic_file(path) as stream:
        writer = None
        for file in files:
            with pq.ParquetFile(file) as parquet:
                writer = writer or pq.ParquetWriter(stream, parquet.schema_arrow)
                for batch in parquet.iter_batches(_ROWS_AT_ONCE):
                    writer.write_batch(batch)
                    num_rows += batch.num_rows
        assert writer is not None, "Spark wrote no file"
        writer.close()
    return num_rows


def _duckdb(options: EngineOptions, scratch: Path) -> Any:
    import ibis

    settings: dict[str, Any] = {"memory_limit": options.memory_limit, "temp_directory": str(scratch / "spill")}
    if options.num_threads:
        settings["threads"] = options.num_threads
    import_module("duckdb")
    try:
        # Rows come sorted where it matters; keeping the order of every file would cost memory. Parquet's statistics
        # leave NaN out, and DuckDB (2.0.1) drops conditions that they say hold for all rows, `not isnan` among them.
        return ibis.duckdb.connect(
            preserve_insertion_order=False, disabled_optimizers="statistics_propagation", **settings
        )
    except Exception as error:
        raise UsageError(f"--memory-limit {options.memory_limit!r}: {error}. Give a size, as 4GB.") from error


def _spark(options: EngineOptions, scratch: Path) -> Any:
    import ibis
    from pyspark.sql import SparkSession

    if options.master.startswith("local"):
        # Executors of one machine find each other by its name, which need not resolve to it.
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    builder = (
        SparkSession.builder.master(options.master)
        .appName("neuclip")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.driver.memory", options.memory_limit.upper().removesuffix("B").replace(" ", ""))
        .config("spark.sql.warehouse.dir", str(scratch / "warehouse"))
        .config("spark.local.dir", str(scratch))
    )
    for setting in options.spark_conf:
        key, _, value = setting.partition("=")
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return ibis.pyspark.connect(session)
