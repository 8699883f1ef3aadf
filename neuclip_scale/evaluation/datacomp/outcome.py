"""What evaluating a task gives."""

from __future__ import annotations

from dataclasses import dataclass

from neuclip_scale.evaluation.datacomp.metrics import Metrics


@dataclass(frozen=True)
class Outcome:
    """Scores of one task, and over how many samples."""

    metrics: Metrics
    num_samples: int
    unreadable: list[str]
