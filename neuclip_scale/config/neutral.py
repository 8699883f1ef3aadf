"""Fields of a recipe that do not change what is computed."""

PLACES = ("run_dir", "name")
"""These tell runs apart."""
NEUTRAL = frozenset(
    {
        # How batches are brought, not which: order and augmentation follow from seed, stream and position.
        "data.num_workers", "data.prefetch_batches", "data.cache_dir", "data.cache_gib",
        # When a run warns or ends.
        "data.stall_warning_seconds", "data.stall_timeout_seconds", "data.max_worker_memory_gib",
        "data.max_bad_fraction", "data.require_audit", "train.hang_timeout_seconds",
        # What it writes; a run goes on from a checkpoint bit for bit.
        "train.log_every_steps", "checkpoint.every_steps", "checkpoint.background", "checkpoint.keep",
        "checkpoint.keep_every_steps",
    }
)  # fmt: skip
"""These cannot change the weights. Those of evaluation are not among them: it averages BatchNorm's statistics."""


def changes_training(name: str) -> bool:
    """Whether a run that goes on with another value of the dotted field is not the run that it was."""
    return name not in (*PLACES, *NEUTRAL, "resume") and not name.startswith("evaluation.")
