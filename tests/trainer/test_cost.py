"""What a run says that it cost: sections that add up, sums over resumptions, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from rich.console import Console
from test_resume import StoppedTrainer
from trainer_helpers import arguments, neuclip_ranks, recipe

from neuclip_scale.checkpoint import latest_checkpoint, load_all_ranks
from neuclip_scale.commands import report
from neuclip_scale.commands.report import costs, named, shares
from neuclip_scale.cost import RunCost
from neuclip_scale.telemetry.flops import CaptionTokens, count_encoder_flops, every_token_flops
from neuclip_scale.trainer import Trainer

PAIRS = 8


def steps_of(run_dir: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines())


def assert_sections_add_up(run_dir: Path) -> None:
    """To the step's time, but for milliseconds between the timer and the clock, and nearly all in named sections.

    In the median: the scheduler may stop the process for long between two readings of the clock.
    """
    left, other = [], []
    for line in steps_of(run_dir):
        spent = sum(value for key, value in line.items() if key.startswith("time/"))
        left.append((line["step_time"] - spent) / line["step_time"])
        other.append(line["time/other"] / line["step_time"])
    assert -1e-3 < median(left) < 0.02
    assert median(other) < 0.1


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("neuclip", {"npn/restart", "npn/update", "npn/predict"}),
        ("fastclip-v3", {"normalizers/table"}),
        ("neuclip-queue", {"normalizers/queue"}),
    ],
)
def test_sections_add_up_to_the_step(shards: Path, runs: Path, objective: str, expected: set[str]) -> None:
    options = {"objective.name": objective, "train.micro_batch_size": 3, "evaluation.normalizer_every_steps": 3}
    # Steps long enough that a busy machine's milliseconds between them are few beside.
    options |= {"model.image_size": 160}
    summary = Trainer(recipe(shards, runs / "run", **options)).fit()
    common = {"data", "encode", "objective", "similarities/sums", "similarities/gradients", "replay", "backward"}
    for line in steps_of(runs / "run"):
        spent = {key.removeprefix("time/"): value for key, value in line.items() if key.startswith("time/")}
        assert spent.keys() == common | expected | {"optimizer", "reduce", "other"}
    assert_sections_add_up(runs / "run")
    sections = summary["cost"]["sections"]
    assert sum(section["share"] for section in sections.values()) == pytest.approx(1)
    whole = sum(section["seconds"] for section in sections.values())
    assert whole == pytest.approx(summary["cost"]["train_seconds"], rel=0.1)


def test_cost_is_summed_over_a_stop(shards: Path, runs: Path) -> None:
    options = {"train.micro_batch_size": 3, "train.kept_micro_batches": 1, "train.kept_tower": "text"}
    options |= {"model.pack_captions": False}
    config = recipe(shards, runs / "run", **options, **{"objective.name": "openclip"})
    stopped = StoppedTrainer(config).fit()["cost"]
    trainer = Trainer(config)
    cost = trainer.fit()["cost"]
    encoders = count_encoder_flops(trainer.engine.module)
    d = trainer.engine.module.embed_dim
    for found, steps in ((stopped, 3), (cost, 6)):
        assert found["flops_per_pair"] == encoders.training
        assert found["model_flops"] == steps * PAIRS * encoders.training
        again = (PAIRS - 3) * encoders.image_forward  # of the kept micro-batch and of the texts nothing is run twice
        assert found["hardware_flops"] == steps * (PAIRS * encoders.training + again)
        assert found["objective_flops"] == steps * 4 * 2 * PAIRS**2 * d
    assert cost["since_step"] == 0
    assert cost["train_seconds"] > stopped["train_seconds"] > 0
    assert cost["energy_joules"] > stopped["energy_joules"] > 0
    assert cost["device_hours"] == pytest.approx(cost["train_seconds"] / 3600)
    assert cost["peak_memory_bytes"] > 2**20
    assert "mfu" not in cost, "a CPU's peak is not known"
    for name, section in stopped["sections"].items():
        assert cost["sections"][name]["seconds"] > section["seconds"]


def test_what_a_kill_cost_is_told_beside_the_cost(shards: Path, runs: Path) -> None:
    """Two steps beyond the checkpoint, as a kill leaves them: they are done again, and counted apart."""
    folder = runs / "run"
    Trainer(recipe(shards, folder, **{"train.num_steps": 2})).fit()
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (3, 4):
            file.write(json.dumps({"step": step, "step_time": 1.5}) + "\n")
    cost = Trainer(recipe(shards, folder)).fit()["cost"]
    assert (cost["lost_steps"], cost["lost_seconds"]) == (2, 3.0)
    assert cost["lost_device_hours"] == pytest.approx(3 / 3600)
    again = Trainer(recipe(shards, folder)).fit()["cost"]
    assert again["lost_seconds"] == 3.0
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "step_time": 0.5}) + "\n")
    more = Trainer(recipe(shards, folder, **{"train.num_steps": 8})).fit()["cost"]
    assert (more["lost_steps"], more["lost_seconds"]) == (3, 3.5)


def test_energy_is_of_training_alone(shards: Path, runs: Path) -> None:
    """A machine without a counter: joules are the stated watts times the seconds of the steps."""
    options = {"evaluation.normalizer_every_steps": 1, "checkpoint.every_steps": 1}
    trainer = Trainer(recipe(shards, runs / "run", **options))
    cost = trainer.fit()["cost"]
    if not cost["energy_source"].startswith("estimate: "):
        pytest.skip(f"this machine measures: {cost['energy_source']}")
    watts = 10.0 * torch.get_num_threads()
    assert f"{watts:g} W per device x seconds" in cost["energy_source"]
    assert cost["energy_joules"] == pytest.approx(watts * cost["train_seconds"], rel=0.15)


def test_a_checkpoint_of_older_code_goes_on(shards: Path, runs: Path) -> None:
    config = recipe(shards, runs / "run")
    StoppedTrainer(config).fit()
    path = latest_checkpoint(runs / "run" / "checkpoints")
    assert path is not None
    shared, _ = load_all_ranks(path)
    del shared["cost"]
    cost = RunCost()
    cost.load(shared, num_ranks=2)
    assert (cost.since_step, cost.model_flops) == (3, 0)
    assert cost.train_seconds == shared["train_seconds"] > 0
    assert cost.device_seconds == 2 * cost.train_seconds
    cost.load({**shared, "cost": cost.state()}, num_ranks=1)
    assert (cost.since_step, cost.device_seconds) == (3, 2 * cost.train_seconds)


def test_mfu_is_of_what_is_needed_and_of_every_token(
    shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both counts, in every step's line, on the screen and over a run that was stopped; here of a peak made up."""
    monkeypatch.setattr("neuclip_scale.cost.device_peak_flops", lambda device, precision: 1e10)
    config = recipe(shards, runs / "run", **{"train.log_every_steps": 1})
    StoppedTrainer(config).fit()
    trainer = Trainer(config)
    cost = trainer.fit()["cost"]
    every, rows = every_token_flops(trainer.engine.module), list(steps_of(runs / "run"))
    assert len(rows) == 6
    for row in rows:
        possible = row["step_time"] * 1e10
        assert row["mfu"] == pytest.approx(row["flops_per_pair"] * PAIRS / possible)
        assert row["mfu_all_tokens"] == pytest.approx(every * PAIRS / possible)
        assert 0 < row["mfu"] < row["mfu_all_tokens"]
    assert cost["mfu"] == pytest.approx(cost["model_flops"] / (cost["train_seconds"] * 1e10))
    assert cost["mfu_all_tokens"] == pytest.approx(6 * PAIRS * every / (cost["train_seconds"] * 1e10))
    assert capsys.readouterr().out.count("  MFU ") == 6


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_packed_captions_are_counted_as_long_as_they_are(shards: Path, runs: Path, world_size: int) -> None:
    """Model FLOPs up to the end tokens of all ranks' captions, hardware FLOPs as long as their rectangles."""
    options = {"train.num_steps": 2, "train.micro_batch_size": 3}
    assert neuclip_ranks(world_size, arguments(shards, runs / "run", **options), runs / "output") == [0] * world_size
    cost = json.loads((runs / "run" / "summary.json").read_text("utf-8"))["cost"]
    trainer = Trainer(recipe(shards, runs / "again", **options))
    encoders, images, texts = count_encoder_flops(trainer.engine.module), 0, 0
    for loaded, _ in zip(trainer.loader, range(2), strict=False):
        for length in loaded.batch.text_lengths:
            texts += encoders.at(CaptionTokens(length, length**2)).training - encoders.training
        images += PAIRS * encoders.training
    assert cost["model_flops"] == pytest.approx(images + texts, rel=1e-6)
    assert texts < 0
    rows = list(steps_of(runs / "run"))
    assert sum(row["flops_per_pair"] for row in rows) * PAIRS == pytest.approx(cost["model_flops"], rel=1e-6)
    assert all(2 < row["caption_tokens"] < trainer.engine.module.context_length for row in rows)
    padded = 2 * encoders.executed(PAIRS, (PAIRS, PAIRS))
    assert cost["model_flops"] < cost["hardware_flops"] < padded


@pytest.mark.distributed
def test_two_ranks_together(shards: Path, runs: Path) -> None:
    """The arithmetic of the whole group; collectives have a section of their own."""
    options = {"train.num_steps": 2, "objective.name": "neuclip", "model.pack_captions": False}
    assert neuclip_ranks(2, arguments(shards, runs / "run", **options), runs / "output") == [0, 0]
    summary = json.loads((runs / "run" / "summary.json").read_text("utf-8"))
    cost, d, m = summary["cost"], 64, 36
    assert cost["model_flops"] == 2 * PAIRS * cost["flops_per_pair"]
    similarities, npn = 6 * 2 * PAIRS**2 * d, (2 * 10 + 1) * 2 * 2 * PAIRS * m * d
    assert cost["objective_flops"] == 2 * (similarities + npn)
    assert cost["device_hours"] == pytest.approx(2 * cost["train_seconds"] / 3600)
    assert cost["sections"]["communication"]["seconds"] > 0
    assert_sections_add_up(runs / "run")


def test_the_report_names_an_estimate(shards: Path, runs: Path) -> None:
    summary = Trainer(recipe(shards, runs / "run", **{"train.num_steps": 2})).fit()
    measured = {**summary, "cost": {**summary["cost"], "energy_source": "measured: RAPL", "energy_joules": 7200.0}}
    guessed = {**summary, "cost": {**summary["cost"], "energy_source": "estimate: 10 W", "energy_joules": 3600.0}}
    older = {key: value for key, value in summary.items() if key != "cost"}
    console = Console(width=200, record=True)
    console.print(costs({"a": measured, "b": guessed, "c": older}))
    console.print(shares({"a": measured, "c": older}))
    text = console.export_text()
    flops = summary["cost"]["hardware_flops"] + summary["cost"]["objective_flops"]
    assert f"{flops / 1e12:,.3g}" in text
    assert "2 Wh " in text
    assert "1 Wh (estimate)" in text
    assert "npn" in text


def test_runs_of_one_name_are_told_apart_by_their_paths() -> None:
    runs = (Path("a/demo"), Path("b/other"))
    assert named(runs) == {"demo": runs[0], "other": runs[1]}
    alike = (Path("a/demo"), Path("b/demo"))
    assert named(alike) == {"a/demo": alike[0], "b/demo": alike[1]}


@pytest.mark.parametrize(
    ("summary", "remedy"),
    [
        ({}, "Train it to its end"),
        ({"status": "stopped"}, "Train it"),
        ({"status": "finished"}, "--evaluation.data"),
        ([], "holds no object"),
    ],
)
def test_a_run_without_scores_is_told_what_it_lacks(
    summary: dict[str, str] | list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert report.main([str(tmp_path)]) == 1
    assert remedy in capsys.readouterr().err


def test_a_run_on_devices_of_several_peaks_has_no_mfu(
    shards: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No one of them is what all its time is to be held against."""
    config = recipe(shards, runs / "run")
    monkeypatch.setattr("neuclip_scale.cost.device_peak_flops", lambda device, precision: 1e10)
    StoppedTrainer(config).fit()
    monkeypatch.setattr("neuclip_scale.cost.device_peak_flops", lambda device, precision: 3e10)
    cost = Trainer(config).fit()["cost"]
    assert not {"mfu", "mfu_all_tokens", "peak_flops_per_second"} & cost.keys()


def write_summary(folder: Path, top1: float | str = 0.5, **changes: float) -> str:
    scores = {"task": "zeroshot", "top1": top1, "top5": 0.8, "mean_per_class_recall": 0.5, "majority": 0.2}
    scores |= {"chance_top1": 0.1, "chance_top5": 0.5, "num_pictures": 30, "num_classes": 10, **changes}
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "evaluation": {"set": scores}}))
    return str(folder)


def test_runs_that_do_not_belong_side_by_side_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set of the same name may be another one; its scores would stand beside the first run's chance and size."""
    first, torn = write_summary(tmp_path / "first"), write_summary(tmp_path / "torn")
    (tmp_path / "torn" / "summary.json").write_text('{"status": "fin')
    for runs, told in (
        ([first, write_summary(tmp_path / "larger", num_pictures=31)], "on others of the same names"),
        ([first, write_summary(tmp_path / "easier", chance_top1=0.2)], "on others of the same names"),
        ([first, write_summary(tmp_path / "diverged", top1="NaN")], "top-1 = NaN"),
        ([torn], "summary.json: is not whole"),
    ):
        assert report.main(runs) == 1
        assert told in capsys.readouterr().err
    (tmp_path / "first" / "metrics.jsonl").unlink()
    assert report.main([first]) == 1
    assert "metrics.jsonl is missing" in capsys.readouterr().err
