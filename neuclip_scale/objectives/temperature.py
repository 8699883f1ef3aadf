"""Whether a learned temperature has a place to rest."""

from __future__ import annotations

import math

from neuclip_scale.config import ObjectiveConfig

_OVER_THE_DATA_SET = ("fastclip-v2", "fastclip-v3", "isogclr", "neuclip", "neuclip-queue", "exact")
_OVER_THE_BATCH = ("rgcl-g",)
WITH_RHO = (*_OVER_THE_DATA_SET, *_OVER_THE_BATCH)
"""Objectives whose temperature `rho` holds up."""


def out_of_reach(section: ObjectiveConfig, dataset_size: int, global_batch_size: int) -> str:
    """Words of warning where `rho` lets the temperature only fall; empty where it does not.

    With p_i the weights of anchor i's negatives, proportional to exp((s_ij - s_ii)/tau), and D the mean of
    KL(p_i, uniform) over both sides, the loss tau log g + rho tau of an anchor has

        dL/dtau = rho - D,    D <= log(number of negatives),

    so tau stops falling only where D is as large as rho (RGCL is the dual of a problem in which KL(p_i, uniform) may
    be at most rho).
    """
    if section.name in _OVER_THE_DATA_SET:
        where, negatives = "the data set", dataset_size - 1
    elif section.name in _OVER_THE_BATCH:
        where, negatives = "the batch", global_batch_size - 1
    else:
        return ""
    most = math.log(max(1, negatives))
    if section.rho < most:
        return ""
    return (
        f"objective.rho = {section.rho:g} is out of reach: {negatives:,} negatives in {where} allow at most "
        f"{most:.1f}, so the temperature falls to objective.temperature_min = {section.temperature_min:g}. "
        f"Try objective.rho={most / 2:.1f}, or less."
    )
