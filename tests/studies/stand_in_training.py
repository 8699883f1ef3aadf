"""Stands for `neuclip train` in tests of `neuclip study methods`: leaves what a training leaves, at once.

    python stand_in_training.py neuclip train RECIPE [section.field=value ...]

An arm called `bad` fails, one called `slow` waits for SIGTERM and saves, and a learning rate of 1 or more diverges.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from neuclip_scale.config import Recipe, dump_recipe, load_recipe

SPEEDS = {"openclip": 64.0, "neuclip": 32.0}
"""Samples a second of arms with seed 0; others are faster, seed by seed."""


def main(recipe: Recipe) -> int:
    """Train, so to say; returns the exit status."""
    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_recipe(recipe), "utf-8")
    if recipe.name == "bad":
        print("error: this arm is bad", flush=True)
        return 2
    if recipe.optim.learning_rate >= 1:
        (folder / "nonfinite_step_000000001_rank_00000.json").write_text("{}")
        print("error: step 1: loss = nan", flush=True)
        return 1
    if recipe.name == "slow":
        return wait_for_sigterm(folder)
    speed = SPEEDS.get(recipe.objective.name, 64.0) * (1 + recipe.seed)
    recall = {"recall@1": recipe.optim.learning_rate}
    sides = {"image_to_text": recall, "text_to_image": recall}
    chances = {f"chance_{side}": {"recall@1": 0.0} for side in sides}
    summary = {
        "status": "finished", "recipe": recipe.name, "objective": recipe.objective.name, "seed": recipe.seed,
        "step": recipe.train.num_steps, "num_steps": recipe.train.num_steps, "samples_per_second": speed,
        "train_seconds": recipe.train.num_steps * recipe.train.global_batch_size / speed,
        "evaluation": {"retrieval": {"task": "retrieval", **sides, **chances}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return 0


def wait_for_sigterm(folder: Path) -> int:
    """As a training that saves before it ends."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    (folder / "waiting").touch()
    while not stopped:
        time.sleep(0.01)
    (folder / "checkpoints" / "step_000000001").mkdir(parents=True)
    return 75


if __name__ == "__main__":
    sys.exit(main(load_recipe(sys.argv[3], sys.argv[4:])))
