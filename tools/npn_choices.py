"""Measure the NPN's open choices on one training trajectory: who estimates the log-normalizers best?

    python tools/npn_choices.py --data demo-data/train --steps 400 --json docs/benchmarks/npn_choices.json

One model is trained (by the objective of --driver); every variant of the NPN, the mini-batch and the u table watch
the same batches without touching it. At chosen steps each estimate is held against the exact value over all training
pairs (`normalizer_monitor`). docs/method.md states the choices made from these figures.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from neuclip_scale.config import NPNConfig, load_recipe
from neuclip_scale.objectives import Objective, ObjectiveOutput
from neuclip_scale.objectives.fastclip import FastCLIP, GammaSchedule
from neuclip_scale.objectives.neuclip import NeuCLIP
from neuclip_scale.similarity import PairFeatures
from neuclip_scale.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str = "demo-data/train"
    """Training shards."""
    steps: int = 400
    """Steps of the trajectory."""
    measure_every: int = 50
    """Steps between measurements; those of the first fifth are left out of the means."""
    global_batch_size: int = 256
    """B."""
    num_prototypes: int = 1024
    """m."""
    restart_every: int = 100
    """T_r."""
    driver: str = "openclip"
    """Objective that trains the model."""
    seed: int = 0
    """Seed of the trajectory."""
    threads: int = 0
    """Threads of torch; 0 takes its default."""
    json: str = ""
    """Write the rows to this file."""


def variants(options: Options) -> dict[str, NPNConfig]:
    """One change at a time from a base, and the learning rates."""
    base: dict[str, Any] = {"num_prototypes": options.num_prototypes, "restart_every": options.restart_every}
    base["reset_accumulator"] = True
    return {
        "base (recent, exclude own, reset, T_u 10, lr .01)": NPNConfig(**base),
        "prototypes from the batch, repeated": NPNConfig(**base, prototype_source="batch"),
        "own prototype kept": NPNConfig(**base, exclude_own=False),
        "batch, own kept": NPNConfig(**base, prototype_source="batch", exclude_own=False),
        "accumulator kept at restarts": NPNConfig(**{**base, "reset_accumulator": False}),
        "lr .001": NPNConfig(**base, learning_rate=0.001),
        "lr .003": NPNConfig(**base, learning_rate=0.003),
        "lr .03": NPNConfig(**base, learning_rate=0.03),
        "T_u 1": NPNConfig(**base, updates_per_step=1),
        "T_u 3": NPNConfig(**base, updates_per_step=3),
        "no restart": NPNConfig(**{**base, "restart_every": 0}),
    }


@dataclass
class Watcher:
    """An estimator beside the training."""

    objective: Objective
    seconds: float = 0.0
    output: ObjectiveOutput | None = None
    errors: list[dict[str, float]] = field(default_factory=list)


class Watched(Objective):
    """The driver's objective; passes every batch on to the watchers."""

    def __init__(self, driver: Objective, watchers: dict[str, Watcher]) -> None:
        super().__init__(driver.tile_size)
        self.driver, self.watchers = driver, watchers

    def compute(
        self, pairs: PairFeatures, scale: Tensor, world_index: Tensor | None, bias: Tensor | None
    ) -> ObjectiveOutput:
        for watcher in self.watchers.values():
            began = time.perf_counter()
            watcher.output = watcher.objective(pairs, scale, world_index)
            watcher.seconds += time.perf_counter() - began
        return self.driver(pairs, scale, world_index, bias)


def measure(options: Options) -> list[dict[str, Any]]:
    """Run the trajectory; one row per estimator."""
    from neuclip_scale.evaluation.normalizer_error import error_statistics

    watchers: dict[str, Watcher] = {}
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data.train": options.data, "run_dir": folder, "evaluation.data": "", "seed": options.seed,
            "objective.name": options.driver, "train.num_steps": options.steps,
            "train.global_batch_size": options.global_batch_size, "checkpoint.every_steps": 0,
            "evaluation.normalizer_every_steps": options.measure_every, "train.log_every_steps": 50,
        }  # fmt: skip
        trainer = Trainer(load_recipe("demo", overrides))
        section, d = trainer.config.objective, trainer.engine.module.embed_dim
        common = {"rho": section.rho, "eps": section.eps, "tile_size": section.tile_size}
        for name, npn in variants(options).items():
            watchers[name] = Watcher(NeuCLIP(d, npn, seed=options.seed, **common))
        epochs = options.steps * options.global_batch_size / trainer.manifest.num_samples
        gamma = GammaSchedule(minimum=0.2, decay_epochs=epochs)
        table = FastCLIP("fastclip-v3", dataset_size=trainer.manifest.num_samples, gamma=gamma, **common)
        watchers["u table, gamma_min .2"] = Watcher(table)
        trainer.objective = Watched(trainer.objective, watchers)
        monitor = trainer.monitor

        def keep(exact: Tensor, output: ObjectiveOutput) -> None:
            for watcher in watchers.values():
                assert watcher.output is not None
                assert watcher.output.normalizers is not None
                watcher.errors.append(error_statistics(watcher.output.normalizers.estimates, exact))
            assert output.normalizers is not None
            batch.append(error_statistics(output.normalizers.batch_rows, exact))

        batch: list[dict[str, float]] = []
        monitor.on_exact = keep
        trainer.fit()
    rows = [_row("mini-batch", batch, 0.0)]
    rows += [_row(name, w.errors, w.seconds / options.steps) for name, w in watchers.items()]
    return rows


def _row(name: str, errors: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    late = errors[max(1, len(errors) // 5) :]
    means = {key: sum(error[key] for error in late) / len(late) for key in late[0]}
    return {"estimator": name, **means, "seconds_per_step": seconds, "measurements": errors}


def main() -> int:
    """Measure, print a table, write JSON."""
    options = tyro.cli(Options, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(options)
    print(f"{'estimator':<52}{'MSE':>9}{'bias':>9}{'worst 10%':>11}{'s/step':>9}")
    for row in rows:
        values = f"{row['mse']:>9.3f}{row['bias']:>9.3f}{row['worst_decile']:>11.3f}{row['seconds_per_step']:>9.3f}"
        print(f"{row['estimator']:<52}{values}")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        document = {"options": vars(options), "torch": torch.__version__, "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
