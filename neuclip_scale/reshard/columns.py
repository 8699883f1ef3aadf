"""Arrays that grow in place: a plan over 100 million samples has no room for a second copy."""

from __future__ import annotations

from typing import Any

import numpy as np


class Column:
    """A one-dimensional array to which parts are appended."""

    def __init__(self, dtype: Any) -> None:
        self._room = np.empty(1024, dtype=dtype)
        self._length = 0

    def append(self, values: np.ndarray) -> None:
        """Add `values` at the end, cast to the column's type."""
        end = self._length + len(values)
        if end > len(self._room):
            # By an eighth only, since numpy fills the room with zeros; large blocks are moved by the page table.
            self._room.resize(max(end, len(self._room) + len(self._room) // 8), refcheck=False)
        self._room[self._length : end] = values
        self._length = end

    def __len__(self) -> int:
        return self._length

    def take(self) -> np.ndarray:
        """The array itself; the column is empty afterwards."""
        room, self._room = self._room, self._room[:0].copy()
        room.resize(self._length, refcheck=False)
        self._length = 0
        return room
