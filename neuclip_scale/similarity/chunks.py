"""How the [b, B] similarities are cut into chunks for a GPU: sizes only, no tensors.

Everything inside a chunk is counted from the chunk's own corner, so that a kernel's 32-bit indices suffice however
large B, b * B or a rank's offset are; what exceeds 2^31 is added here, in Python's integers, and by torch's slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ChunkLimits:
    """Sizes that bound memory and indices, whatever the batch."""

    edge: int = 16384
    """Rows and columns of a chunk of statistics; it leaves one number for each row and block of columns."""
    height: int = 4096
    """Rows of a chunk of weights."""
    weight_bytes: int = 64 << 20
    """Memory of a chunk of weights, the only square thing that is ever stored."""
    split_depth: int = 1024
    """Least depth of a product that is divided among programs; see `num_splits`."""

    def weight_columns(self, num_rows: int, item_size: int) -> int:
        """Columns of a chunk of weights over `num_rows` rows, a multiple of 128 where there is room for it."""
        columns = self.weight_bytes // (item_size * min(num_rows, self.height))
        return max(columns // 128 * 128, min(columns, 128), 1)


class Chunk(NamedTuple):
    """Rows of the left features against rows of the right ones."""

    rows: slice
    columns: slice
    diagonal: int
    """Entry (r, r + diagonal) of the chunk is a positive pair; the chunk's width where it holds none."""


def chunks(num_left: int, num_right: int, *, offset: int, height: int, width: int) -> Iterator[Chunk]:
    """Cover [num_left, num_right], where row i of the left pairs with row offset + i of the right."""
    for first in range(0, num_left, height):
        rows = slice(first, min(first + height, num_left))
        for start in range(0, num_right, width):
            columns = slice(start, min(start + width, num_right))
            num_rows, num_columns = rows.stop - first, columns.stop - start
            diagonal = offset + first - start
            yield Chunk(rows, columns, diagonal if -num_rows < diagonal < num_columns else num_columns)


def num_splits(num_tiles: int, depth: int, least_depth: int, *, wanted: int = 128, most: int = 16) -> int:
    """Programs among which the sum behind each output tile is divided, so that about `wanted` run at once.

    A rank with few rows has few output tiles, yet long sums. Depends on sizes alone, so the order of a sum does too.
    """
    return max(1, min(most, wanted // num_tiles, depth // least_depth))
