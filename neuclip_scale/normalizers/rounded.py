"""A bf16 copy of a large buffer, kept up to date where the buffer changes in few rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Rounded:
    """Follows one buffer. No part of a module's state: whoever copies or loads the module makes it anew.

    Changes of the buffer that did not go through `write` are noticed by torch's own count of them, and cost a new copy.
    """

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._version = -1
        self._copy: Tensor | None = None

    def __deepcopy__(self, memo: object) -> Rounded:
        return Rounded()

    def __reduce__(self) -> tuple[type[Rounded], tuple[()]]:
        return Rounded, ()

    def of(self, source: Tensor) -> Tensor:
        """`source` in bf16; the first call takes the memory."""
        if not self._follows(source):
            self._copy = source.to(torch.bfloat16)
            self._source, self._version = source, source._version
        assert self._copy is not None
        return self._copy

    def write(self, source: Tensor, places: Tensor | slice, rows: Tensor) -> None:
        """source[places] = rows, and so in the copy if there is one."""
        follows = self._follows(source)
        source[places] = rows
        if follows and self._copy is not None:
            self._copy[places] = rows.to(torch.bfloat16)
            self._version = source._version

    def _follows(self, source: Tensor) -> bool:
        return self._source is source and self._version == source._version
