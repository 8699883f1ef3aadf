"""Checkpoints: written under a temporary name, verified, renamed; read back only if every checksum holds.

    checkpoints/step_000001000/shared.pt        written by rank 0: objective, recipe, counters, data position
                               rank_00000.pt    of one rank: its share of the parameters and their optimizer state,
                                                random number states, its shard of a table
                               checksums.json   format, step, world size, size and sha256 of each file
    checkpoints/latest                          for people; never trusted when resuming

Bytes are written by a thread while training goes on; the rename comes when all ranks have written.
A kill at any moment leaves every finished checkpoint whole. Hidden folders are its traces: `.tmp-step_N` was
being written, `.trash-step_N` deleted, `.old-step_N` replaced; the next save clears them away. Files hold
tensors, numbers, strings, lists, tuples and dicts, read with `weights_only=True`: loading runs no code.
"""

from __future__ import annotations

from neuclip_scale.checkpoint.inspecting import convert, describe
from neuclip_scale.checkpoint.layout import CheckpointError, checkpoints_by_step
from neuclip_scale.checkpoint.parameters import keep_share, load_parameters
from neuclip_scale.checkpoint.reading import (
    latest_checkpoint,
    load_all_ranks,
    load_checkpoint,
    read_checksums,
    verify_checkpoint,
)
from neuclip_scale.checkpoint.rng import capture_rng, restore_rng
from neuclip_scale.checkpoint.runs import check_compatible, find_checkpoint, load_run_model, saved_recipe
from neuclip_scale.checkpoint.writing import PendingSave, save_checkpoint, snapshot, start_save

__all__ = [
    "CheckpointError",
    "PendingSave",
    "capture_rng",
    "check_compatible",
    "checkpoints_by_step",
    "convert",
    "describe",
    "find_checkpoint",
    "keep_share",
    "latest_checkpoint",
    "load_all_ranks",
    "load_checkpoint",
    "load_parameters",
    "load_run_model",
    "read_checksums",
    "restore_rng",
    "save_checkpoint",
    "saved_recipe",
    "snapshot",
    "start_save",
    "verify_checkpoint",
]
