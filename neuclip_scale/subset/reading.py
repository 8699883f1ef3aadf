"""Which of a pool's parquets cannot be read, when a query over all of them fails."""

from __future__ import annotations

from pathlib import Path


def whole_columns(asked: tuple[Path, tuple[str, ...]]) -> str:
    """Read some columns of a parquet to their end; returns what is wrong, or an empty text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, names = asked
    try:
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(1 << 16, columns=list(names)):
                batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read to its end ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return ""
