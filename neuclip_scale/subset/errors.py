"""What stops a selection, told to the user in one line."""

from __future__ import annotations


class SubsetError(ValueError):
    """A pool, a model or a file that cannot be used; the message names it and the remedy."""


class UsageError(SubsetError):
    """Arguments that contradict each other or cannot be understood."""


class DamagedFileError(ValueError):
    """One file of the pool that cannot be read; it is listed, and the others are used."""
