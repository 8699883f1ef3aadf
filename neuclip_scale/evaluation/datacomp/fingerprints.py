"""What a result depends on, as short digests: a result is taken over only where they are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from neuclip_scale.evaluation.datacomp.tasks import Task
from neuclip_scale.evaluation.encoders import Encoders

VERSION = 2
"""Of the metrics and of how data are read: raised when a change of the code may change a score."""

_WHOLE_FILE = 1 << 20


def model_digest(encoders: Encoders) -> str:
    """Digest of the weights, the architecture, and how pictures and texts become their inputs."""
    tokenizer = encoders.tokenizer
    digest = hashlib.sha256()
    for part in (
        str(VERSION),
        str(encoders.model),  # two activations, say, can have the same weights
        str(encoders.transform),
        f"{type(tokenizer).__name__} {tokenizer.context_length} {tokenizer.vocab_size}",
    ):
        digest.update(part.encode() + b"\0")
    for name, tensor in sorted(encoders.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + b"\0")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_digest(task: Task, folder: Path) -> str:
    """Digest of the names and sizes of all files of a set, the content of small ones and the time of large ones."""
    rows = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        state = path.stat()
        small = state.st_size <= _WHOLE_FILE
        content = hashlib.sha256(path.read_bytes()).hexdigest() if small else str(state.st_mtime_ns)
        rows.append([str(name), state.st_size, content])
    return hashlib.sha256(json.dumps([str(task), rows]).encode()).hexdigest()
