"""What stops an audit, told to the user in one line."""

from __future__ import annotations


class AuditError(ValueError):
    """A list, a download or a folder that cannot be used; the message names it and the remedy."""


class UsageError(AuditError):
    """Arguments that contradict each other or cannot be understood."""
