"""Some neighbouring rows of a parquet, narrowed filter by filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows that passed every filter so far."""

    batch: Any
    """`pyarrow.RecordBatch` of n rows."""
    places: np.ndarray
    """[n] int64, growing: the place of each in its file."""

    def __len__(self) -> int:
        return len(self.places)

    def where(self, mask: np.ndarray) -> Rows:
        """Those where `mask`, [n] bool, is true."""
        import pyarrow as pa

        return Rows(self.batch.filter(pa.array(mask)), self.places[mask])

    def texts(self, column: str) -> list[str | None]:
        """A column of texts; what is no UTF-8 in it becomes U+FFFD."""
        import pyarrow as pa

        array = self.batch.column(column)
        try:
            return list(array.to_pylist())
        except UnicodeDecodeError:
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            parts = array.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            return [None if part is None else part.decode("utf-8", "replace") for part in parts]

    def numbers(self, column: str) -> np.ndarray:
        """[n] float64, NaN where there is none."""
        import pyarrow as pa

        array = self.batch.column(column).cast(pa.float64(), safe=False)  # whole numbers above 2^53 are rounded
        return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.float64)
