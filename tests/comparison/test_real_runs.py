"""Runs that the trainer made, two objectives with two seeds each, compared end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluation_helpers import COLOURS, jpeg, write_set
from trainer_helpers import recipe

from neuclip_scale import cli
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.trainer import Trainer

OBJECTIVES, SEEDS, STEPS = ("openclip", "neuclip"), (0, 1), 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The runs' folders, removed at the end: their checkpoints are 100 MB each."""
    folder = tmp_path_factory.mktemp("compared")
    write_synthetic_shards(folder / "shards", num_samples=40, samples_per_shard=14, image_size=40, seed=1)
    pictures = [{"png": jpeg(colour), "cls": str(i)} for i, colour in enumerate(COLOURS.values())]
    write_set(folder / "eval" / "zeroshot", [pictures], classnames="\n".join(COLOURS))
    pairs = [{"png": jpeg(colour), "txt": name} for name, colour in COLOURS.items()]
    write_set(folder / "eval" / "retrieval", [pairs], dataset_type="retrieval")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = []
    for name in OBJECTIVES:
        for seed in SEEDS:
            made.append(folder / f"{name}-{seed}")
            changes = {"seed": seed, "objective.name": name, "train.num_steps": STEPS}
            evaluated = {"evaluation.data": str(folder / "eval"), "evaluation.every_steps": 2}
            Trainer(recipe(folder / "shards", made[-1], **changes, **evaluated)).fit()
    torch.set_num_threads(threads)
    yield made
    shutil.rmtree(folder)


def test_two_objectives_with_two_seeds(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *map(str, runs), "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    document = json.loads((tmp_path / "compare.json").read_text("utf-8"))
    assert document["verdict"] == "Recipes differ in the method and the seed only."
    assert [arm["runs"] for arm in document["arms"]] == [["openclip-0", "openclip-1"], ["neuclip-0", "neuclip-1"]]
    orders = document["data"]["orders"]
    assert [(order["labels"], order["last_step"], order["parts_at"]) for order in orders] == [
        (["openclip-0", "neuclip-0"], STEPS, None),
        (["openclip-1", "neuclip-1"], STEPS, None),
    ]
    assert {row["arms"]["neuclip"]["n"] for row in document["metrics"]["rows"]} == {2}
    assert {(len(pair["seeds"]), pair["smallest_p"]) for pair in document["metrics"]["pairs"]} == {(2, 0.5)}
    summary = json.loads((runs[0] / "summary.json").read_text("utf-8"))
    assert document["cost"]["openclip-0"]["training, s"] == summary["train_seconds"]


def test_scores_measured_during_training_become_curves(runs: list[Path], tmp_path: Path) -> None:
    cli.main(["compare", *map(str, runs), "--output", str(tmp_path)])
    document = json.loads((tmp_path / "compare.json").read_text("utf-8"))
    curve = document["curves"][0]["evaluations"]["zeroshot/top1"]
    assert curve["samples"] == [16, 32]
    assert 0 < curve["seconds"][0] < curve["seconds"][1]
    summary = json.loads((runs[0] / "summary.json").read_text("utf-8"))
    assert curve["values"][-1] == pytest.approx(summary["evaluation"]["zeroshot"]["top1"])
    assert (tmp_path / "index.html").read_text("utf-8").count("data:image/png;base64,") == 4


def test_curves_of_scores_need_no_event_files(runs: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / run.name for run in runs[:2]]
    for run, copy in zip(runs, copies):
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("tensorboard", "checkpoints"))
    cli.main(["compare", *map(str, copies), "--output", str(tmp_path / "out")])
    curves = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["curves"][0]["evaluations"]
    summary = json.loads((runs[0] / "summary.json").read_text("utf-8"))
    assert curves["zeroshot/top1"]["values"][-1] == summary["evaluation"]["zeroshot"]["top1"]


def test_another_order_of_the_same_data(runs: list[Path], tmp_path: Path) -> None:
    """The same recipe and seed but for `data.shuffle_window`: other batches from some step on."""
    other = tmp_path / "other"
    changes = {"objective.name": "openclip", "train.num_steps": STEPS, "data.shuffle_window": 3}
    Trainer(recipe(runs[0].parent / "shards", other, **changes)).fit()
    shutil.rmtree(other / "checkpoints")
    assert cli.main(["compare", str(runs[0]), str(other), "--output", str(tmp_path / "out")]) == 1
    document = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert [finding["kind"] for finding in document["findings"]] == ["recipe", "data"]
    assert "data.shuffle_window" in document["findings"][0]["text"]
    (order,) = document["data"]["orders"]
    lines = [
        [json.loads(line)["batch_digest"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        for run in (runs[0], other)
    ]
    assert order["parts_at"] == next(i for i, (a, b) in enumerate(zip(*lines), start=1) if a != b)
