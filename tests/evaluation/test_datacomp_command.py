"""`neuclip evaluate --suite datacomp`: a folder, the hub, two ranks, bad usage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from datacomp_helpers import SUITE_KEYS, write_captions_table, write_classification, write_suite
from hub_server import HubServer, serve_hub
from trainer_helpers import neuclip_ranks, start

from neuclip_scale.commands.evaluate import main
from neuclip_scale.evaluation.datacomp.hub import fetch
from neuclip_scale.evaluation.datacomp.tasks import select_tasks
from neuclip_scale.evaluation.datasets import EvaluationDataError


def arguments(weights: Path, data: Path, *more: str) -> list[str]:
    return [str(weights), "--preset", "demo", "--device", "cpu", "--suite", "datacomp", "--data", str(data), *more]


def test_scores_averages_and_what_is_missing(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    write_classification(data / "wds_imagenet1k_test", [5])
    (data / "wds_mnist_test").mkdir()
    command = arguments(weights, data, "--output", str(output), "--json", str(tmp_path / "r.json"))
    assert main([*command, "--tasks", "imagenet1k", "mnist", "STL-10"]) == 1
    printed = capsys.readouterr().out
    for text in (
        "ImageNet 1k: acc1",
        "missing, and in no average:\n  stl10: ",
        "wds_mnist_test is no evaluation set",
        "incomplete, and in no average:\n  imagenet1k: 5 samples, where DataComp has 50,000",
    ):
        assert text in printed
    summary = json.loads((tmp_path / "r.json").read_text())
    assert summary["missing"] == [
        {"key": "stl10", "folder": str(data / "wds_stl10_test"), "hub": "djghosh/wds_stl10_test"}
    ]
    assert summary["model"] == str(weights)
    assert main([*command, "--tasks", "imagenet", "--any-size"]) == 0
    assert "only of 1 of 38 tasks" in capsys.readouterr().out
    (line,) = (output / "eval_results.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"key", "dataset", "metrics"}


def test_two_ranks(weights: Path, tmp_path: Path) -> None:
    write_classification(tmp_path / "data/mnist", [9], seed=4)
    command = arguments(weights, tmp_path / "data", "--tasks", "mnist", "--batch-size", "2", "--output")
    assert neuclip_ranks(2, ["evaluate", *command, str(tmp_path / "two")], tmp_path / "log") == [0, 0]
    assert main([*command, str(tmp_path / "one")]) == 0
    one, two = (tmp_path / name / "eval_results.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert "MNIST: acc1" in (tmp_path / "log.0").read_text()
    assert "MNIST" not in (tmp_path / "log.1").read_text()


def test_a_kill_keeps_the_tasks_before_it(weights: Path, tmp_path: Path) -> None:
    data, output = write_suite(tmp_path / "data"), tmp_path / "out"
    command = arguments(weights, data, "--tasks", *SUITE_KEYS, "--output", str(output))
    with start(["evaluate", *command], tmp_path / "log") as started:
        deadline = time.monotonic() + 120
        while not any((output / "tasks").glob("wds_*.json")):
            assert started.is_alive(), started.text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
    # Its end was SIGKILL.
    done = {path: path.stat().st_mtime_ns for path in (output / "tasks").glob("wds_*.json")}
    assert 0 < len(done) < len(SUITE_KEYS)
    assert main(command) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    lines = (output / "eval_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(SUITE_KEYS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    with serve_hub(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_sets_from_the_hub(weights: Path, tmp_path: Path, hub: HubServer) -> None:
    mnist, coco = select_tasks(["mnist", "MSCOCO"])
    write_classification(hub.root / mnist.repository, [3, 2])
    (hub.root / mnist.repository / "README.md").write_text("not needed")
    write_captions_table(hub.root / coco.repository, 3)
    data = tmp_path / "data"
    command = arguments(weights, data, "--hub", "--output", str(tmp_path / "out"), "--tasks")
    assert main([*command, "mnist", "MSCOCO"]) == 0
    assert len((tmp_path / "out/eval_results.jsonl").read_text().splitlines()) == 2
    assert "README.md" not in hub.requested
    # What is there is not fetched again, and what lacks is.
    hub.requested.clear()
    fetch(mnist, data)
    assert hub.requested == []
    (data / mnist.folder / "test/1.tar").unlink()
    fetch(mnist, data)
    assert hub.requested == ["1.tar"]


def test_a_hub_that_has_not_the_set(tmp_path: Path, hub: HubServer) -> None:
    (task,) = select_tasks(["stl10"])
    with pytest.raises(EvaluationDataError, match=r"djghosh/wds_stl10_test could not be fetched .* leave --hub out"):
        fetch(task, tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--suite", "datacomp"], "give --output FOLDER"),
        (["--suite", "datacomp", "--output", "o", "--figures", "f"], "--figures draws no page"),
        (["--suite", "datacomp", "--output", "o", "--tasks", "mist"], "'mist' is no task"),
        (["--tasks", "mnist"], "--tasks belongs to --suite datacomp"),
        (["--hub"], "--hub belongs to --suite datacomp"),
    ],
)
def test_bad_usage(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    assert main([str(weights), "--preset", "demo", "--data", str(tmp_path), *options]) == 2
    assert text in capsys.readouterr().err
