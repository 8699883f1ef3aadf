"""What goes wrong with a reproduction."""

from __future__ import annotations


class ReproduceError(RuntimeError):
    """A stage cannot be done; the message says what happened and what to do."""


class TrainingsFailedError(ReproduceError):
    """Trainings or evaluations failed; all that did not need them has been done, the report too."""
