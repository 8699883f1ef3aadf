"""Processes forked from a server that has imported what they need: started in a tenth of a second, not in several.

There is one server for all tests that a worker runs, so each module that uses it adds to what it imports.
"""

from __future__ import annotations

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Have the server import `modules` too. To be called where a test module is imported: later it runs already."""
    _preloaded.extend(name for name in modules if name not in _preloaded)
    FORKSERVER.set_forkserver_preload(_preloaded)


def preload_training() -> None:
    """What a process that trains imports; the first optimizer alone imports torch._dynamo, which takes 3 s."""
    preload(
        "neuclip_scale.trainer", "neuclip_scale.commands.train", "torch._dynamo", "torch.utils.tensorboard", "pytest"
    )


def preload_deepspeed() -> None:
    """What a rank under ZeRO imports besides: its Muon, used or not, brings torch's compiler."""
    preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon")
