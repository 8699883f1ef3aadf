"""The next step is launched before a step's numbers are read, and nothing but the time tells."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import StoppedTrainer, final_checkpoint, state_of
from trainer_helpers import assert_same, logged_steps, recipe, start_ranks

from neuclip_scale import checkpoint
from neuclip_scale.config import Recipe
from neuclip_scale.launched_step import QueuedNumbers
from neuclip_scale.non_finite import NonFiniteLossError
from neuclip_scale.optim import TEMPERATURE
from neuclip_scale.trainer import Trainer

TOY: dict[str, Any] = {"model.preset": "toy", "model.dropout": 0.1}
FASTCLIP = TOY | {"objective.name": "fastclip-v3", "optim.temperature_learning_rate": 0.02}


class AtOnce(Trainer):
    """Reads every step's numbers before it launches the next."""

    def _reads_at_once(self, step: int) -> bool:
        return True


class WatchedTrainer(Trainer):
    """Notes tau's learning rate in each step."""

    def __init__(self, config: Recipe) -> None:
        super().__init__(config)
        self.rates: list[float] = []

    def train_step(self, *given: Any) -> Any:
        self.rates += [group["lr"] for group in self.engine.optimizer.param_groups if group["name"] == TEMPERATURE]
        return super().train_step(*given)


def small_at(step: int, shards: Path, run_dir: Path) -> dict[str, Any]:
    """`FASTCLIP` whose tau, which falls, is small at this step for the first time."""
    options = FASTCLIP | {"optim.temperature_schedule": "constant"}
    Trainer(recipe(shards, run_dir, **options)).fit()
    taus = [1 / line["logit_scale"] for line in logged_steps(run_dir)]
    assert sorted(taus, reverse=True) == taus
    return options | {"optim.temperature_drop_at": (taus[step - 1] + taus[step - 2]) / 2}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "L LR LR LR LR LR LRR S"),
        ({"checkpoint.every_steps": 4}, "L LR LR LRR S L LR LRR S"),
        ({"checkpoint.every_steps": 1}, "LR S LR S LR S LR S LR S LR S LR S"),
        ({"evaluation.every_steps": 3}, "L LR LRR E L LR LRR E LR S"),
        ({"evaluation.normalizer_every_steps": 3}, "L LRR L LR LRR L LRR S"),
    ],
)
def test_a_step_is_launched_before_the_one_before_is_read(
    shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: str
) -> None:
    """Unless it is the last, or is saved or evaluated, or the next is measured."""
    trainer, events = Trainer(recipe(shards, runs / "run", **{"train.num_steps": 7}, **TOY, **options)), []

    def note(owner: Any, name: str, letter: str) -> None:
        original = getattr(owner, name)

        def noted(*given: Any, **named: Any) -> Any:
            events.append(letter)
            return original(*given, **named)

        monkeypatch.setattr(owner, name, noted)

    note(trainer, "train_step", "L")
    note(QueuedNumbers, "read", "R")
    note(trainer.run_state, "start_save", "S")
    note(trainer, "_evaluate_between", "E")
    trainer.fit()
    assert "".join(events) == expected.replace(" ", "")


@pytest.mark.parametrize("objective", ["openclip", "neuclip", "fastclip-v3"])
def test_numbers_and_weights_are_those_of_reading_at_once(shards: Path, runs: Path, objective: str) -> None:
    options = TOY | {"objective.name": objective, "evaluation.normalizer_every_steps": 4, "optim.ema_decay": 0.9}
    options |= {"train.num_steps": 9, "checkpoint.every_steps": 5, "optim.temperature_drop_at": 0.5}
    options |= {"objective.gamma_decay_epochs": 2, "data.num_workers": 1}
    found = []
    for kind in (Trainer, AtOnce):
        trainer = kind(recipe(shards, runs / kind.__name__, **options))
        assert trainer.fit()["status"] == "finished"
        steps = [{**line, "normalizer/seconds": 0} for line in logged_steps(runs / kind.__name__)]
        flops = trainer.run_state.cost.objective_flops
        found.append([steps, state_of(trainer), final_checkpoint(runs / kind.__name__), flops])
    assert_same(*found)


@pytest.mark.parametrize("kind", [Trainer, AtOnce])
def test_the_temperature_slows_down_at_the_second_step_after_it_was_small(
    shards: Path, runs: Path, kind: type[Trainer]
) -> None:
    options = small_at(3, shards, runs / "first")
    trainer = type("Both", (WatchedTrainer, kind), {})(recipe(shards, runs / "run", **options))
    trainer.fit()
    rate = options["optim.temperature_learning_rate"]
    assert trainer.rates == pytest.approx([rate] * 4 + [rate / 3] * 2)


def test_a_stop_near_the_slowing_down_changes_nothing(shards: Path, runs: Path) -> None:
    options = small_at(3, shards, runs / "first")
    whole = Trainer(recipe(shards, runs / "whole", **options))
    whole.fit()
    for step in (2, 3, 4):  # saved at the step after
        config = recipe(shards, runs / f"parts{step}", **options)
        trainer = StoppedTrainer(config)
        trainer.stop_in_step = step
        assert trainer.fit()["step"] == step + 1
        resumed = AtOnce(config) if step == 3 else Trainer(config)
        assert resumed.fit()["status"] == "finished"
        assert_same(logged_steps(runs / f"parts{step}"), logged_steps(runs / "whole"))
        assert_same(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("dropped", [False, True])
def test_a_checkpoint_that_only_says_that_the_rate_has_fallen(
    shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    config = recipe(shards, runs / "run", **FASTCLIP)
    StoppedTrainer(config).fit()
    load_all_ranks = checkpoint.load_all_ranks

    def of_older_code(path: Path) -> Any:
        shared, ranks = load_all_ranks(path)
        del shared["small_temperature_step"]
        return shared | {"temperature_dropped": dropped}, ranks

    monkeypatch.setattr(checkpoint, "load_all_ranks", of_older_code)
    state = Trainer(config).run_state
    assert state.step == 3
    assert state.temperature_dropped(4) == dropped


def test_a_step_with_a_number_that_is_none_is_named_after_the_next_was_launched(shards: Path, runs: Path) -> None:
    config = recipe(shards, runs / "run", **TOY, **{"checkpoint.every_steps": 4})
    trainer = Trainer(config)
    step, seen = trainer.train_step, []

    def poisoned(batch: Any, *rest: Any) -> Any:
        seen.append(list(batch.uids))
        result = step(batch, *rest)
        if len(seen) == 3:
            result.output.loss.fill_(float("nan"))
        return result

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match="step 3: loss = nan"):
        trainer.fit()
    assert len(seen) == 4
    report = json.loads((runs / "run" / "nonfinite_step_000000003_rank_00000.json").read_text("utf-8"))
    assert report["uids"] == seen[2]
    assert [line["step"] for line in logged_steps(runs / "run")] == [1, 2]
    assert not list((runs / "run" / "checkpoints").glob("step_*"))


def test_a_step_that_cannot_begin_leaves_the_one_before_it_its_line(shards: Path, runs: Path) -> None:
    trainer = Trainer(recipe(shards, runs / "run", **TOY))
    launch = trainer.train_step

    def fails_in_the_fourth(*given: Any) -> Any:
        if trainer.run_state.launched == 3:
            raise OSError("no space left")
        return launch(*given)

    trainer.train_step = fails_in_the_fourth  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space left"):
        trainer.fit()
    assert [line["step"] for line in logged_steps(runs / "run")] == [1, 2, 3]


def test_step_times_add_up_to_the_time_of_the_loop(shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what saves and measures."""
    options = TOY | {"checkpoint.every_steps": 2, "evaluation.normalizer_every_steps": 3}
    trainer = Trainer(recipe(shards, runs / "run", **options))
    save, run_steps, spent = trainer.run_state.start_save, trainer._run_steps, {"save": 0.0, "loop": 0.0}

    def timed(name: str, call: Any, *given: Any) -> None:
        began = time.perf_counter()
        call(*given)
        spent[name] += time.perf_counter() - began

    def slow_save(*given: Any) -> None:
        save(*given)
        time.sleep(0.5)

    monkeypatch.setattr(trainer.run_state, "start_save", lambda *given: timed("save", slow_save, *given))
    monkeypatch.setattr(trainer, "_run_steps", lambda *given: timed("loop", run_steps, *given))
    trainer.fit()
    lines = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [line["step_time"] for line in lines]
    measured = sum(line.get("normalizer/seconds", 0.0) for line in lines)
    assert measured > 0
    assert min(times) > 0
    assert spent["save"] > 1.5
    assert sum(times) == pytest.approx(spent["loop"] - spent["save"] - measured, abs=0.4)


# ---------------------------------------------------------------------------------------------------------------------


def train(config: Recipe, kind: type[Trainer], stop_in_step: int) -> int:
    """Train; rank 1 alone gets SIGTERM in a step."""

    class Signalled(kind):  # type: ignore[misc, valid-type]
        def train_step(self, *given: Any) -> Any:
            if self.rank == 1 and self.run_state.launched + 1 == stop_in_step:
                signal.raise_signal(signal.SIGTERM)
            return super().train_step(*given)

    print(Signalled(config).fit()["step"])
    return 0


@pytest.mark.distributed
@pytest.mark.parametrize("step", [2, 3])
def test_all_ranks_stop_at_the_step_after_the_one_in_which_one_was_asked_to(
    shards: Path, runs: Path, step: int
) -> None:
    options = small_at(3, shards, runs / "first")

    def ranks(name: str, kind: type[Trainer], stop_in_step: int = 0) -> list[str]:
        started = start_ranks(2, train, (recipe(shards, runs / name, **options), kind, stop_in_step), runs / name)
        assert [rank.wait() for rank in started] == [0, 0], started[0].text() + started[1].text()
        return [rank.text().splitlines()[-1] for rank in started]

    assert ranks("whole", AtOnce) == ["6", "6"]
    assert ranks("parts", Trainer, step) == [str(step + 1)] * 2
    assert ranks("parts", Trainer) == ["6", "6"]
    assert_same(logged_steps(runs / "parts"), logged_steps(runs / "whole"))
    assert_same(final_checkpoint(runs / "parts"), final_checkpoint(runs / "whole"))
