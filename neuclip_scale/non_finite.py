"""A step whose numbers are not finite ends the run, and says where to look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuclip_scale import distributed, files


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite; names the step, the ranks and the file with the batch's uids."""


def check_finite(
    metrics: Mapping[str, Any],
    features: Sequence[Tensor],
    uids: Sequence[str],
    step: int,
    run_dir: Path,
    precision: str,
) -> None:
    """Raise NonFiniteLossError on every rank if the reduced `metrics` hold a loss or gradient that is not finite.

    A collective in that case only, which the ranks agree on since the metrics are equal. `features` and `uids` are of
    this rank's pairs. Each rank leaves its uids in `run_dir`.
    """
    # fp16's loss scaler looks for bad gradients itself: it skips the update and lowers its scale.
    watched = ("loss",) if precision == "fp16" else ("loss", "grad_norm")
    bad = next((name for name in watched if not math.isfinite(metrics[name])), None)
    if bad is None:
        return
    rank = distributed.rank()
    path = run_dir / f"nonfinite_step_{step:09d}_rank_{rank:05d}.json"
    finite = all(bool(torch.isfinite(side).all()) for side in features)
    files.write_json(path, {"step": step, "rank": rank, "features_finite": finite, "uids": uids})
    everyone = distributed.gather_objects((rank, finite, uids[:3]))
    culprits = [entry for entry in everyone if not entry[1]] or everyone
    listed = "; ".join(f"rank {rank} (uids {', '.join(uids)}, ...)" for rank, _, uids in culprits)
    source = "backward pass" if math.isfinite(metrics["loss"]) else "objective"
    cause = "features are not finite" if not culprits[0][1] else f"features are finite, the {source} is not"
    raise NonFiniteLossError(
        f"step {step}: {bad} = {metrics[bad]}; {cause} on {listed}. All uids: {path.parent}/nonfinite_step_*. "
        f"Lower optim.learning_rate, clip with train.max_grad_norm, or use bf16; "
        f"the last checkpoint in {run_dir / 'checkpoints'} is from before this step."
    )
