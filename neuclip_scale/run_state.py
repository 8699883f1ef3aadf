"""Where a run stands: what a checkpoint holds beside weights, and the signals that end a run early."""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neuclip_scale import checkpoint, distributed
from neuclip_scale.config import ConfigError, Recipe, changes_training, dump_recipe, recipe_changes
from neuclip_scale.cost import RunCost
from neuclip_scale.data.epochs import EpochLedger, joined, whole_epoch
from neuclip_scale.data.loader import LoadedBatch, TrainLoader
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.mixing import MixedOrder
from neuclip_scale.data.streams import StreamOrder
from neuclip_scale.engines import Engine
from neuclip_scale.launched_step import StepNumbers
from neuclip_scale.objectives import Objective

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped on a signal (EX_TEMPFAIL): run again to go on."""


class RunState:
    """Counters of a run and their way into and out of checkpoints."""

    def __init__(self, folder: Path, config: Recipe) -> None:
        self.folder, self.config = folder, config
        self.step = 0
        """Steps whose numbers have been read."""
        self.launched = 0
        """Steps that have been launched; ahead of `step` while the numbers of the last are under way."""
        self.num_read = 0
        self.num_skipped = 0
        self.cost = RunCost()
        self.small_temperature_step: int | None = None
        """The first step that saw tau at `temperature_drop_at` or below."""
        self.epochs = EpochLedger()
        """What this rank has read of the epochs that are not over; after a resumption rank 0 keeps everybody's."""
        self.epochs_checked = 0
        """Epochs that are over and were held against the manifest."""
        self.epochs_wrong = 0
        self.stream_positions: list[int] = []
        """Of all streams, after the last step; empty before the first one of this process."""
        self._positions: dict[int, int] = {}
        self.changed: dict[str, tuple[Any, Any]] = {}
        """Fields in which the recipe is not that of the checkpoint that was loaded, with both values."""
        self._pending: checkpoint.PendingSave | None = None

    @property
    def change_told(self) -> str:
        """What is to be said of a recipe that is not the checkpoint's; empty where nothing computed changes."""
        told = [
            f"{name} {before!r} -> {after!r}"
            for name, (before, after) in self.changed.items()
            if changes_training(name)
        ]
        where = f"from step {self.step} on the recipe is another than before"
        return f"{where}: {', '.join(told)}. `neuclip compare` will say so." if told else ""

    def find_start(self) -> Path | None:
        """The checkpoint that `resume` asks for, or None for a fresh run (collective).

        Raises CheckpointError, ConfigError. The files of one that was given by its path are verified as it is loaded.
        """
        resume = self.config.resume
        if resume not in ("auto", "never"):
            distributed.on_main(lambda: checkpoint.read_checksums(Path(resume)))
            return Path(resume)
        return distributed.on_main(lambda: self._newest(refuse=resume == "never"))

    def _newest(self, *, refuse: bool) -> Path | None:
        present = checkpoint.checkpoints_by_step(self.folder)
        if not present:
            return None
        if refuse:
            held = f"{self.folder} already holds {len(present)} checkpoint(s)"
            raise ConfigError("resume", "never", held, "Use another run_dir, or resume=auto.")
        found = checkpoint.latest_checkpoint(self.folder)
        if found is None:  # starting over would overwrite what can perhaps be rescued
            raise checkpoint.CheckpointError(
                f"none of the {len(present)} checkpoint(s) in {self.folder} is intact. "
                "Repair one (the warnings above say what is wrong), or start another run_dir."
            )
        return found

    def temperature_dropped(self, step: int) -> bool:
        """Whether tau's learning rate has fallen at `step` (the first is 1), for good: tau may rise again.

        It does at the second step after tau was small: the first one may have been launched before that was read.
        """
        return self.small_temperature_step is not None and step >= self.small_temperature_step + 2

    def advance(self, loaded: LoadedBatch, numbers: StepNumbers) -> None:
        """Note a step whose numbers have been read."""
        self.step += 1
        self.num_read += numbers.num_read
        self.num_skipped += numbers.num_skipped
        self._positions = dict(loaded.stream_positions)
        self.epochs.merge(loaded.epochs)
        tau = 1 / numbers.metrics["logit_scale"]
        if self.small_temperature_step is None and tau <= self.config.optim.temperature_drop_at:
            self.small_temperature_step = self.step

    def close_epochs(self, order: StreamOrder | MixedOrder, positions: Sequence[int]) -> list[str]:
        """What is to be said of the epochs that ended with this step (collective).

        `positions` of ALL streams, equal on every rank: an epoch is over when the last stream has finished it.
        """
        self.stream_positions = list(positions)
        told = []
        over = min(map(order.epoch_of, range(order.num_streams), positions)) if order.whole_epochs else 0
        while self.epochs_checked < over:
            epoch = self.epochs_checked
            own = self.epochs.close(epoch)
            found = joined({epoch: part} for part in distributed.gather_objects(own))[epoch]
            if found == whole_epoch(order.num_samples):
                told.append(f"epoch {epoch + 1}: each of the {order.num_samples} samples was read once")
            else:
                self.epochs_wrong += 1
                told.append(
                    f"epoch {epoch + 1}: {found[0]} samples were read, but not each of the {order.num_samples} in the "
                    "manifest once. This is a fault of the loader; please report it with the run folder."
                )
            self.epochs_checked += 1
        return told

    @property
    def save_is_written(self) -> bool:
        """Whether a checkpoint waits for the other ranks to be written too (no communication)."""
        return self._pending is not None and self._pending.is_written

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if there is one (collective)."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finish()

    def start_save(self, engine: Engine, objective: Objective, manifest: Manifest) -> None:
        """Begin to write a checkpoint of this step, which `finish_save` finishes (collective)."""
        self.finish_save()
        persistent = engine.module.state_dict().keys()
        positions: dict[int, int] = {}
        ranks = distributed.gather_objects((self._positions, self.epochs.open))
        for part, _ in ranks:
            positions.update(part)
        parameters = checkpoint.keep_share(engine.named_state())
        shared = {
            "buffers": {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent},
            "engine": engine.scalar_state(),
            "objective": objective.state_dict(),
            "recipe": dump_recipe(self.config),
            "data_fingerprint": manifest.fingerprint,
            "stream_positions": [positions[stream] for stream in sorted(positions)],
            "epochs": {str(epoch): list(sums) for epoch, sums in joined(part for _, part in ranks).items()},
            "epochs_checked": [self.epochs_checked, self.epochs_wrong],
            "step": self.step,
            "samples_seen": self.step * self.config.train.global_batch_size,
            "num_read": self.num_read,
            "num_skipped": self.num_skipped,
            "train_seconds": self.cost.train_seconds,
            "cost": self.cost.state(),
            "small_temperature_step": self.small_temperature_step,
            "torch_version": str(torch.__version__),
        }
        per_rank = {
            "random": checkpoint.capture_rng(),
            "objective": checkpoint.snapshot(objective.rank_state()),
            "parameters": parameters,
        }
        section = self.config.checkpoint
        self._pending = checkpoint.start_save(
            self.folder,
            self.step,
            checkpoint.snapshot(shared) if distributed.is_main() else {},
            per_rank,
            keep=section.keep,
            keep_every=section.keep_every_steps,
        )

    def load(self, path: Path, engine: Engine, objective: Objective, loader: TrainLoader, manifest: Manifest) -> None:
        """Go on from checkpoint `path`, also one saved by another number of ranks (collective)."""
        shared, ranks = checkpoint.load_all_ranks(path)
        saved = checkpoint.saved_recipe(shared)
        checkpoint.check_compatible(saved, self.config)
        self.changed = recipe_changes(saved, self.config)
        self._check_same_order(shared, manifest)
        checkpoint.load_parameters(engine, ranks)
        for name, buffer in shared["buffers"].items():
            engine.module.get_buffer(name).copy_(buffer)
        engine.load_scalar_state(shared["engine"])
        objective.load_state_dict(shared["objective"])
        objective.load_rank_states([state["objective"] for state in ranks])
        loader.load_positions(shared["stream_positions"], num_read=shared["num_read"])
        if distributed.is_main():
            self.epochs.merge({int(epoch): tuple(sums) for epoch, sums in shared["epochs"].items()})
        self.epochs_checked, self.epochs_wrong = shared["epochs_checked"]
        self.step = self.launched = shared["step"]
        self.cost.load(shared, len(ranks))
        self.num_read, self.num_skipped = shared["num_read"], shared["num_skipped"]
        # Older code only said that it had fallen, or that it would with the next step.
        older = self.step - 1 if shared.get("temperature_dropped") else None
        self.small_temperature_step = shared.get("small_temperature_step", older)
        if len(ranks) == distributed.world_size():
            checkpoint.restore_rng(ranks[distributed.rank()]["random"])
        else:
            # No rank of the old run is this one; draw from streams that no earlier step has used.
            distributed.seed_everything(self.config.seed + 1_000_003 * self.step, offset=1 + distributed.rank())

    def _check_same_order(self, shared: dict[str, Any], manifest: Manifest) -> None:
        """A resumed run must see the samples the interrupted one would have seen."""
        saved = checkpoint.saved_recipe(shared)
        now = self.config
        fields = {
            "data.num_streams": (saved.data.num_streams, now.data.num_streams),
            "data.shuffle_window": (saved.data.shuffle_window, now.data.shuffle_window),
            "data.weights": (saved.data.weights, now.data.weights),
            "data.replacement": (saved.data.replacement, now.data.replacement),
            "train.global_batch_size": (saved.train.global_batch_size, now.train.global_batch_size),
            "seed": (saved.seed, now.seed),
        }
        for name, (before, after) in fields.items():
            if before != after:
                raise ConfigError(
                    name, after, f"the checkpoint was made with {before}, so the data order would change",
                    f"Use {before}, or another run_dir.",
                )  # fmt: skip
        if shared["data_fingerprint"] != manifest.fingerprint:
            raise ConfigError(
                "data.train",
                now.data.train,
                "not the shards the checkpoint was trained on: names, counts or sizes differ",
                "Restore them, or start another run_dir.",
            )


class StopSignal:
    """Notes SIGTERM and SIGUSR1 instead of dying; restores the old handlers on exit."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return bool(self.name)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.name = signal.Signals(number).name
