"""Memory that is used again."""

from __future__ import annotations

import numpy as np


class Buffer:
    """Bytes for one use after the other.

    Fresh memory of this size comes from the kernel page by page, which takes longer than reading a file into it.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def take(self, num_bytes: int) -> np.ndarray:
        """`num_bytes` uint8 with anything in them; what was taken before is no longer to be used."""
        if len(self._memory) < num_bytes:
            self._memory = np.empty(num_bytes, dtype=np.uint8)
        return self._memory[:num_bytes]
