"""Which implementation computes the similarities: torch everywhere, Triton on GPUs that it is made for.

`NEUCLIP_SIMILARITY` is `auto` (or unset), `torch` or `triton`. `triton` is for a GPU that `auto` leaves to torch, and
for tests on a CPU, where Triton must have been started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from neuclip_scale import distributed

VARIABLE = "NEUCLIP_SIMILARITY"
MIN_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: bf16 and TF32 tensor cores."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Below, a product is mostly waiting; rows that are no multiple of 16 elements cannot be loaded in 16-byte pieces.
_MIN_DIM, _DIM_STEP = 64, 16

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Implementation and why."""

    name: str  # "torch" or "triton"
    reason: str


class Kernels(NamedTuple):
    """Triton kernels that some work may be left to."""

    work: str
    """For the log, with a place for the dtype."""
    check: str
    """Module whose `disagreement(device, dtype, dim)` says where they are off on a device, and is empty if nowhere."""


SIMILARITIES = Kernels("similarities of {} features", "neuclip_scale.similarity.triton_check")


def choose(kernels: Kernels, rows: Tensor) -> Choice:
    """What computes with these rows [*, d]; says so in the log, once for each work and kind of rows.

    Raises ValueError for a `NEUCLIP_SIMILARITY` that is not known, or cannot be had for these rows.
    """
    return choose_for(kernels, rows.device, rows.dtype, rows.shape[1])


def choose_for(kernels: Kernels, device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
    """As `choose`, for rows of `dim` numbers."""
    return _choose(kernels, os.environ.get(VARIABLE, "auto"), device, dtype, dim)


def choose_alike(kernels: Kernels, rows: Tensor) -> Choice:
    """As `choose`, the same on all ranks, for work that they share piece by piece: torch where one of them must
    (collective, the first time).
    """
    return _choose_alike(kernels, choose(kernels, rows), rows.device, distributed.world_size())


@cache
def _choose_alike(kernels: Kernels, own: Choice, device: torch.device, world_size: int) -> Choice:
    names = distributed.gather_objects(own.name)
    if len(set(names)) == 1:
        return own
    others = ", ".join(str(rank) for rank, name in enumerate(names) if name == "torch")
    log.warning("%s: torch on all ranks, for these must and their logs say why: %s", kernels.check, others)
    return Choice("torch", f"ranks {others} must")


@cache
def _choose(kernels: Kernels, wanted: str, device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"{VARIABLE}={wanted}: no such implementation. Choose auto, torch or triton.")
    choice = decide(kernels, wanted, device, dtype, dim)
    work = kernels.work.format(str(dtype).removeprefix("torch."))
    log.info("%s of width %d on %s: %s (%s)", work, dim, device, choice.name, choice.reason)
    return choice


def decide(kernels: Kernels, wanted: str, device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
    """See `choose`; looks at the device and tries the kernels on it each time."""
    if wanted == "torch":
        return Choice("torch", f"{VARIABLE}=torch")
    impossible = _impossible(device, dtype)
    if wanted == "triton":
        if impossible:
            raise ValueError(f"{VARIABLE}=triton: {impossible}. Unset it, or set it to torch.")
        return Choice("triton", f"{VARIABLE}=triton")
    if device.type != "cuda":
        return Choice("torch", f"Triton is for GPUs, not for {device.type}")
    doubtful = impossible or _doubtful(device, dim) or _failure(kernels, device, dtype, dim)
    return Choice("torch", doubtful) if doubtful else Choice("triton", "it passed its check on this device")


def _impossible(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton cannot do it at all; empty if it can."""
    if dtype not in _DTYPES:
        return f"Triton's kernels take bf16, fp16 or fp32, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"on {device.type} Triton runs in its interpreter only, with TRITON_INTERPRET=1 from the start"
    return ""


def _doubtful(device: torch.device, dim: int) -> str:
    """Why torch is the better choice on a GPU; empty if it is not."""
    if torch.version.hip:
        return "Triton's kernels were never tried with ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    if dim < _MIN_DIM or dim % _DIM_STEP:
        return f"width {dim} is no multiple of {_DIM_STEP} from {_MIN_DIM} on"
    return ""


def _failure(kernels: Kernels, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """What is wrong with Triton on this device; empty where its results are torch's."""
    try:
        with torch.cuda.device(device):  # Triton launches on the current one
            found: str = importlib.import_module(kernels.check).disagreement(device, dtype, dim)
    except Exception as error:  # whatever a compiler or driver raises: a run must not end for want of a faster kernel
        log.warning("Triton's kernels do not run here; torch takes their place", exc_info=True)
        return f"Triton's kernels do not run here ({type(error).__name__})"
    return found
