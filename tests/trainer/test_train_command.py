"""`neuclip train`: what people may write, what they are told, and what they get."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from trainer_helpers import arguments, logged_steps, neuclip

from neuclip_scale import cli
from neuclip_scale.commands.train import read_arguments
from neuclip_scale.config import load_recipe, recipe_names


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `neuclip train ...`, in this process."""
    try:
        status = cli.main(["train", *argv])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def test_no_recipe_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--run-dir", "x"]):
        status, output, error = run(capsys, *argv)
        assert (status, output) == (2, "")
        assert error.startswith("usage: neuclip train RECIPE")
        assert all(name in error for name in recipe_names())


def test_help_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, error = run(capsys, "--help")
    assert (status, error) == (0, "")
    assert "`neuclip train RECIPE --help` lists every field" in output
    assert "75 saved and stopped" in output


def test_help_lists_every_field_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = run(capsys, "demo", "--help")
    assert status == 0
    words = " ".join(output.replace("│", " ").split())
    batch = load_recipe("demo").train.global_batch_size  # the recipe's own, not the schema's default
    assert (
        f"--train.global-batch-size INT Pairs per step over all ranks: the contrastive batch. (default: {batch})"
        in words
    )
    assert "--objective.npn.restart-every INT" in words
    assert re.search(r"--objective\.name \{openclip,siglip,sogclr,.*?\} Training objective\. \(default: ", words)


def test_an_unknown_recipe_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, error = run(capsys, "dmeo")
    assert (status, output) == (2, "")
    assert error.startswith("error: recipe = 'dmeo': neither a packaged recipe nor a file.")
    assert "demo" in error.partition(".")[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["optim.learnin_rate=1"],
            "error: optim.learnin_rate = 1: there is no such field. Did you mean optim.learning_rate?",
        ),
        (["--optim.learnin_rate", "1"], "--optim.learning-rate FLOAT"),
        (["objective.name=fastclip-v9"], "Choose from openclip, siglip, sogclr"),
        (["--objective.name", "fastclip-v9"], "'fastclip-v2', 'fastclip-v3',"),
        (["train.num_steps=many"], "error: train.num_steps = 'many': has type str. Give a whole number."),
        (["--train.num_steps", "many"], "--train.num-steps"),
        (["train.num_steps"], "Unrecognized options: train.num_steps"),
        (["--train.global_batch_size", "6", "--run-dir", "x"], "error: train.global_batch_size = 6: not a multiple of"),
        (["--train.num_steps", "-1", "--run-dir", "x"], "error: train.num_steps = -1: must not be negative"),
        (
            ["--model.preset", "ViT-B32", "--run-dir", "{folder}/run", "--data.train", "{shards}"],
            "Did you mean ViT-B-32",
        ),
        (
            ["--evaluation.data", "{folder}/none", "--run-dir", "{folder}/run", "--data.train", "{shards}"],
            "/none': '{folder}/none' holds no evaluation set",
        ),
        (
            ["--json", "{folder}", "--run-dir", "x", "--data.train", "{shards}"],
            "error: --json = '{folder}': is a folder.",
        ),
        (["--data.train", "{shards}"], "error: run_dir = '': the run has no folder. Give --run-dir DIR."),
        (["data.train=''", "--run-dir", "x"], "error: data.train = '': there is no training data. Give --data.train"),
    ],
)
def test_bad_usage_exits_with_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    tmp_path: Path,
    argv: list[str],
    message: str,
) -> None:
    filled = [part.format(shards=shards, folder=tmp_path) for part in argv]
    if "evaluation.data" not in "".join(filled):
        filled += ["--evaluation.data", ""]
    monkeypatch.chdir(tmp_path)  # where `make demo` has not been run
    status, output, error = run(capsys, "demo", *filled)
    assert (status, output) == (2, "")
    assert message.format(folder=tmp_path) in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


def test_shards_that_are_not_there_are_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--run-dir", str(tmp_path / "run"), "--data.train", str(tmp_path / "none"), "--evaluation.data", ""]
    status, _, error = run(capsys, "demo", *options)
    assert status in (1, 2)
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "none") in line


@pytest.mark.parametrize("name", ["none", "none/{00..03}.tar", "none.json"])
def test_data_that_name_nothing_are_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    options = ["--run-dir", str(tmp_path / "run"), "--data.train", str(tmp_path / name), "--evaluation.data", ""]
    assert run(capsys, "demo", *options)[0] == 2


def test_both_ways_of_writing_a_field() -> None:
    assignments = [
        "train.num_steps=7",
        "optim.betas=[0.8, 0.9]",
        "model.grad_checkpointing=true",
        "optim.learning_rate=1e-3",
    ]
    options = ["--train.global_batch_size", "12", "--data.num-workers=0", "--data.crop_scale", "0.5", "1.0"]
    # What follows an option is its value, whatever it looks like.
    mixed = ["seed=3", "--model.compile", "False", "--json", "out.json", "--run-dir", "name=x"]
    recipe, json_path = read_arguments(["demo", *assignments, *options, *mixed])
    changed = {
        "train.num_steps": 7,
        "train.global_batch_size": 12,
        "data.num_workers": 0,
        "optim.betas": [0.8, 0.9],
        "data.crop_scale": [0.5, 1.0],
        "seed": 3,
        "model.grad_checkpointing": True,
        "optim.learning_rate": 0.001,
        "run_dir": "name=x",
    }
    assert recipe == load_recipe("demo", changed)
    assert json_path == "out.json"


def test_an_option_wins_over_an_assignment() -> None:
    assert read_arguments(["demo", "--seed", "1", "seed=2"])[0].seed == 1


def test_a_run_from_a_recipe_file_writes_its_summary(shards: Path, runs: Path) -> None:
    recipe_file, result = runs / "mine.yaml", runs / "results" / "run.json"
    recipe_file.write_text("name: mine\nmodel: {preset: demo}\ndata: {num_streams: 4}\n", encoding="utf-8")
    _, _, *options = arguments(shards, runs / "run", **{"train.num_steps": 2, "train.log_every_steps": 1})
    argv = ["train", str(recipe_file), *options, "objective.name=fastclip-v3", "--json", str(result)]
    status, text = neuclip(argv, runs / "output.txt")
    assert status == 0, text
    assert f"run folder: {runs / 'run'} " in text
    summary = json.loads(result.read_text("utf-8"))
    assert summary == json.loads((runs / "run" / "summary.json").read_text("utf-8"))
    expected = {"status": "finished", "recipe": "mine", "objective": "fastclip-v3", "step": 2, "samples_seen": 16}
    assert {key: summary[key] for key in expected} == expected
    assert [line["normalizer/gamma"] for line in logged_steps(runs / "run")] == [1.0, 1.0]
    # The resolved recipe, from which the run can be done again.
    again = load_recipe(runs / "run" / "config.yaml")
    assert (again.name, again.objective.name, again.train.num_steps) == ("mine", "fastclip-v3", 2)
    assert json.loads((runs / "run" / "environment.json").read_text("utf-8"))["compiled_towers"] is False
