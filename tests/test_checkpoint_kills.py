"""Real processes killed at random moments while they save."""

from __future__ import annotations

import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from forking import FORKSERVER, preload
from kill_helpers import newest_of_intact, rest_of, was_interrupted

from neuclip_scale.checkpoint import load_checkpoint, save_checkpoint

preload("neuclip_scale.checkpoint", __name__)


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
        reported += rest_of(reader)
        num_interrupted += was_interrupted(tmp_path)
        shared, _ = load_checkpoint(newest_of_intact(tmp_path), rank=0)
        assert shared["step"] >= max(reported)
        assert bool((shared["weight"] == shared["step"]).all())
        newest_step = shared["step"]
    assert num_interrupted > 10, "the kills did not hit saves in progress, so they prove nothing"
