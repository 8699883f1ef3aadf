"""What stops a query, told to the user in one line."""

from __future__ import annotations


class QueryError(ValueError):
    """A library that is missing, or a query that its engine refuses; the message names the remedy."""


class UsageError(QueryError):
    """Settings of an engine that cannot be understood."""
