"""A run that was stopped or killed goes on as if nothing had happened, bit for bit; one that cannot says why."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from trainer_helpers import arguments, assert_same, logged_steps, neuclip, recipe, start, wait_for_steps

from neuclip_scale.checkpoint import latest_checkpoint, load_all_ranks
from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.data.batch import Batch
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.telemetry.starts import read_starts
from neuclip_scale.trainer import Trainer


class StoppedTrainer(Trainer):
    """Gets SIGTERM in the middle of step 2, so that the step which is launched before the others know is the last."""

    stop_in_step = 2

    def train_step(self, batch: Batch, *rest: Any) -> Any:
        if self.run_state.launched + 1 == self.stop_in_step:
            signal.raise_signal(signal.SIGTERM)
        return super().train_step(batch, *rest)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that a step of this run changes."""
    return {
        "parameters": dict(trainer.engine.named_state()),
        "buffers": dict(trainer.engine.module.named_buffers()),
        "engine": trainer.engine.scalar_state(),
        "objective": trainer.objective.state_dict(),
        "rank": trainer.objective.rank_state(),
        "positions": trainer.loader.positions,
        "read": trainer.run_state.num_read,
    }


def final_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint without what names the folder or the clock."""
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    shared, ranks = load_all_ranks(path)
    theirs = ("recipe", "train_seconds", "cost")
    return {key: value for key, value in shared.items() if key not in theirs} | {"ranks": ranks}


@pytest.mark.parametrize(
    ("objective", "workers", "micro"),
    [("openclip", 0, 3), ("fastclip-v3", 2, 3), ("neuclip", 0, 0), ("neuclip", 2, 3), ("neuclip-queue", 0, 3)],
)
def test_stop_and_resume_change_nothing(shards: Path, runs: Path, objective: str, workers: int, micro: int) -> None:
    """With dropout, so that the generators' states count, and with uneven micro-batches (8 = 3 + 3 + 2)."""
    options = {
        "objective.name": objective,
        "objective.queue.project_anew": True,
        "data.num_workers": workers,
        "train.micro_batch_size": micro,
        "model.dropout": 0.1,
    }
    whole = Trainer(recipe(shards, runs / "whole", **options))
    assert whole.fit()["status"] == "finished"
    config = recipe(shards, runs / "parts", **options)
    stopped = StoppedTrainer(config).fit()
    assert (stopped["status"], stopped["step"]) == ("stopped", 3)
    resumed = Trainer(config)
    assert resumed.run_state.step == 3
    assert resumed.fit()["status"] == "finished"

    assert_same(logged_steps(runs / "parts"), logged_steps(runs / "whole"))
    assert [line["step"] for line in logged_steps(runs / "parts")] == list(range(1, 7))
    assert_same(state_of(resumed), state_of(whole))


def test_the_same_trainer_goes_on_after_a_stop(shards: Path, runs: Path) -> None:
    options = {"model.dropout": 0.1, "data.num_workers": 1}
    Trainer(recipe(shards, runs / "whole", **options)).fit()
    trainer = StoppedTrainer(recipe(shards, runs / "parts", **options))
    assert trainer.fit()["status"] == "stopped"
    assert trainer.fit()["status"] == "finished"
    assert_same(logged_steps(runs / "parts"), logged_steps(runs / "whole"))


def test_measuring_does_not_change_the_run(shards: Path, runs: Path) -> None:
    options = {"model.dropout": 0.1, "train.num_steps": 4}
    Trainer(recipe(shards, runs / "plain", **options)).fit()
    Trainer(recipe(shards, runs / "measured", **options, **{"evaluation.normalizer_every_steps": 2})).fit()
    plain, measured = logged_steps(runs / "plain"), logged_steps(runs / "measured")
    assert "normalizer/num_reference" in measured[1]
    assert_same([{key: line[key] for key in plain[0]} for line in measured], plain)


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(shards: Path, runs: Path) -> None:
    """A checkpoint after every step takes longer than the step, so that kills hit saves as well as steps."""
    options = {"model.dropout": 0.1, "train.num_steps": 13, "data.num_workers": 1, "objective.name": "fastclip-v3"}
    assert neuclip(arguments(shards, runs / "whole", **options), runs / "whole.txt")[0] == 0
    options["checkpoint.every_steps"] = 1
    run_dir, draw, period, num_in_save = runs / "killed", random.Random(0), 0.0, 0
    workers: list[psutil.Process] = []
    for number in range(6):
        saved, began = saved_step(run_dir), time.time()
        with start(arguments(shards, run_dir, **options), runs / f"{number}.txt") as started:
            wait_for_steps(run_dir, saved + 1, started.is_alive, since=began)
            if not period:
                first = time.monotonic()
                wait_for_steps(run_dir, saved + 2, started.is_alive)
                period = time.monotonic() - first
            time.sleep(draw.uniform(0.0, period))
            workers += psutil.Process(started.pid).children()
        partial = (run_dir / "checkpoints").glob(".tmp-*")
        num_in_save += any(path.stat().st_mtime > began for path in partial)
    assert num_in_save >= 2, "too few kills hit a save"
    assert len(workers) == 6
    status, text = neuclip(arguments(shards, run_dir, **options), runs / "last.txt")
    assert status == 0, text

    assert [line["step"] for line in logged_steps(run_dir)] == list(range(1, 14))
    assert_same(logged_steps(run_dir), logged_steps(runs / "whole"))
    assert_same(final_checkpoint(run_dir), final_checkpoint(runs / "whole"))
    assert not list((run_dir / "checkpoints").glob(".*")), "what killed saves left is cleared away"
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "workers outlive the run they belong to"


def saved_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*")), default=0)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    Trainer(recipe(shards, folder / "run", **{"train.num_steps": 2})).fit()
    yield folder / "run"
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("resume", "never", "resume"),
        ("train.global_batch_size", 12, "train.global_batch_size"),
        ("seed", 1, "seed"),
        ("data.num_streams", 2, "data.num_streams"),
        ("data.shuffle_window", 9, "data.shuffle_window"),
        ("objective.name", "openclip", "objective.name"),
        ("objective.npn.num_prototypes", 16, "objective.npn.num_prototypes"),
        ("model.dropout", 0.1, "model.dropout"),
        ("model.preset", "ViT-B-32", "model.preset"),
    ],
)
def test_another_run_than_the_checkpoints_is_refused(
    shards: Path, finished: Path, field: str, value: object, named: str
) -> None:
    before = sorted(path.name for path in finished.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        Trainer(recipe(shards, finished, **{"train.num_steps": 4, field: value}))
    assert named in str(caught.value)
    assert "another run_dir" in str(caught.value)
    assert sorted(path.name for path in finished.rglob("*")) == before


def test_other_shards_are_refused(finished: Path, tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "other", num_samples=40, samples_per_shard=20, image_size=40, seed=1)
    with pytest.raises(ConfigError, match=r"data\.train = .*not the shards the checkpoint was trained on"):
        Trainer(recipe(tmp_path / "other", finished, **{"train.num_steps": 4}))


def test_a_copy_of_the_shards_elsewhere_is_the_same_data(shards: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    assert Trainer(recipe(tmp_path / "copy", finished, **{"train.num_steps": 2})).run_state.step == 2


def test_refusals_exit_with_2_and_one_line(shards: Path, finished: Path, tmp_path: Path) -> None:
    status, text = neuclip(arguments(shards, finished, resume="never"), tmp_path / "output.txt")
    assert status == 2
    (line,) = text.splitlines()
    assert line.startswith("error: resume = 'never': ")
    assert line.endswith("another run_dir, or resume=auto.")


def test_a_finished_run_is_not_done_again(shards: Path, finished: Path) -> None:
    lines = (finished / "metrics.jsonl").read_bytes()
    summary = Trainer(recipe(shards, finished, **{"train.num_steps": 2})).fit()
    assert (summary["status"], summary["step"]) == ("finished", 2)
    assert (finished / "metrics.jsonl").read_bytes() == lines


def test_resume_from_a_path_with_other_learning_rates(shards: Path, finished: Path, runs: Path) -> None:
    """What the checkpoint's optimizer was built with must not win over the recipe."""
    options = {"resume": str(finished / "checkpoints" / "step_000000002"), "train.num_steps": 3}
    options |= {"optim.schedule": "constant", "optim.learning_rate": 3e-5, "optim.temperature_learning_rate": 2e-5}
    options |= {"optim.weight_decay": 0.3, "optim.betas": [0.8, 0.9]}
    trainer = Trainer(recipe(shards, runs / "run", **options))
    trainer.fit()
    groups = {group["name"]: group for group in trainer.engine.optimizer.param_groups}
    assert {group["weight_decay"] for group in groups.values()} == {0.3, 0.0}
    assert groups["encoders 0"]["betas"] == (0.8, 0.9)
    assert groups["temperature"]["lr"] == 2e-5
    (line,) = (json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines())
    assert (line["step"], line["lr"]) == (3, 3e-5)


def test_a_checkpoint_of_another_run_in_the_folder_is_where_a_run_begins(
    shards: Path, finished: Path, runs: Path
) -> None:
    """What `neuclip job check` and docs/slurm.md advise for jobs that are queued again."""
    name = "checkpoints/step_000000002"
    shutil.copytree(finished / name, runs / "run" / name)
    assert Trainer(recipe(shards, runs / "run", **{"train.num_steps": 3})).fit()["step"] == 3
    assert [line["step"] for line in logged_steps(runs / "run")] == [3]


def test_a_run_that_goes_on_with_another_recipe_keeps_the_history(shards: Path, runs: Path) -> None:
    folder = runs / "run"
    options = {"train.num_steps": 2, "checkpoint.every_steps": 1, "data.num_workers": 0}
    Trainer(recipe(shards, folder, **options)).fit()
    other = {"train.num_steps": 3, "optim.learning_rate": 3e-5, "train.log_every_steps": 7, "resume": "auto"}
    status, text = neuclip(arguments(shards, folder, **{**options, **other}), runs / "output.txt")
    assert status == 0, text
    told = "warning: from step 2 on the recipe is another than before: "
    told += "optim.learning_rate 0.0003 -> 3e-05, train.num_steps 2 -> 3. `neuclip compare` will say so."
    assert told in " ".join(text.split()), text
    first, second = read_starts(folder)
    assert (first.step, first.changed, second.step) == (0, {}, 2)
    assert second.changed["optim.learning_rate"] == [3e-4, 3e-5]
    assert first.environment["packages"]["torch"] == second.environment["packages"]["torch"]
    # Nothing is left to train: what the run was trained with stays.
    Trainer(recipe(shards, folder, **{**options, **other, "optim.learning_rate": 1.0})).fit()
    assert load_recipe(folder / "config.yaml").optim.learning_rate == 3e-5
    assert len(read_starts(folder)) == 2


def test_a_damaged_history_says_what_to_do(shards: Path, runs: Path) -> None:
    folder = runs / "run"
    Trainer(recipe(shards, folder, **{"train.num_steps": 1})).fit()
    (folder / "starts.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"run_dir = .*starts.jsonl.*damaged.*Remove it"):
        Trainer(recipe(shards, folder, **{"train.num_steps": 2})).fit()


def test_a_path_without_a_checkpoint_is_an_error(shards: Path, runs: Path) -> None:
    status, text = neuclip(arguments(shards, runs / "run", resume=str(runs / "no")), runs / "output.txt")
    assert status == 1
    assert text == f"error: {runs}/no/checksums.json is missing. Give a folder like RUN/checkpoints/step_000001000.\n"
    assert not (runs / "run" / "manifest.json").exists()  # told before the data are looked at, which can take hours
