"""Whether torch or Triton sums over a queue: as `similarity.choosing`, by the same `NEUCLIP_SIMILARITY`."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from neuclip_scale.similarity.choosing import VARIABLE, Choice, check_name, decide, tried

log = logging.getLogger(__name__)


def choose(entries: Tensor) -> Choice:
    """What sums over these entries [M/W, d]; says so in the log, once for each width, dtype and device.

    Raises ValueError for a `NEUCLIP_SIMILARITY` that is not known, or cannot be had for them.
    """
    return _choose(os.environ.get(VARIABLE, "auto"), entries.device, entries.dtype, entries.shape[1])


@cache
def _choose(wanted: str, device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
    choice = decide(check_name(wanted), device, dtype, dim, _failure)
    kind = f"{str(dtype).removeprefix('torch.')} entries of width {dim} on {device}"
    log.info("queue with %s: %s (%s)", kind, choice.name, choice.reason)
    return choice


def _failure(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """What is wrong with Triton on this device; empty where its results are torch's."""

    def check() -> str:
        from neuclip_scale.normalizers.triton_queue_check import disagreement

        return disagreement(device, dim)

    return tried(check)
