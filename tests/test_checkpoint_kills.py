"""Real processes killed at random moments while they save."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from neuclip_scale.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint

# One server imports torch (seconds); each process a test needs is then forked from it at once.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["neuclip_scale.checkpoint", __name__])


def save_in_a_loop(folder: Path, step: int, finished: Connection) -> None:
    while True:
        for _ in range(2):  # the second replaces the first
            weight = torch.full((20_000,), float(step))
            save_checkpoint(folder, step, {"step": step, "weight": weight}, {}, keep=2)
            finished.send(step)
        step += 1


def test_sigkill_at_any_moment_leaves_the_last_finished_save(tmp_path: Path) -> None:
    """Kills at random moments of a process that saves, replaces and prunes without pause, in one folder."""
    draw = random.Random(0)
    newest_step, num_interrupted = 0, 0
    for _ in range(40):
        reader, writer = FORKSERVER.Pipe(duplex=False)
        saver = FORKSERVER.Process(target=save_in_a_loop, args=(tmp_path, newest_step + 1, writer))
        saver.start()
        writer.close()
        reported = [reader.recv()]  # one save is done: from here on it is in the middle of another
        time.sleep(draw.uniform(0.0, 0.06))
        saver.kill()
        saver.join()
        while True:
            try:
                reported.append(reader.recv())
            except EOFError:
                break
        num_interrupted += any(path.name.startswith(".") for path in tmp_path.iterdir())
        for path in tmp_path.glob("step_*"):
            verify_checkpoint(path)  # a kill tears none, not even one about to be deleted
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        shared, _ = load_checkpoint(newest, rank=0)
        assert shared["step"] >= max(reported)
        assert bool((shared["weight"] == shared["step"]).all())
        newest_step = shared["step"]
    assert num_interrupted > 10, "the kills did not hit saves in progress, so they prove nothing"
