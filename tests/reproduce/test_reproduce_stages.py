"""Stages are done once, in order, and never with a result of other settings."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.reproduce.building import build_stages, chosen
from neuclip_scale.reproduce.costs import estimate
from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.experiment import changed, experiment_names, load_experiment
from neuclip_scale.reproduce.places import Places
from neuclip_scale.reproduce.preparing import audit_facts
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.running import Runner
from neuclip_scale.reproduce.stages import Command, Kind, Stage
from neuclip_scale.reproduce.training import _whole, evaluate_stage, train_arguments


class World:
    """Stages that append their names to a file, by real programs."""

    def __init__(self, root: Path) -> None:
        self.places, self.done = Places(root), root / "done.txt"
        self.said: list[str] = []

    def stage(
        self, name: str, *after: str, kind: Kind = "processors", code: str = "", settings: Any = None, **more: Any
    ) -> Stage:
        program = f"{code}\nopen({str(self.done)!r}, 'a').write({name!r} + ' ')"
        return Stage(name, after, settings or {}, (Command((sys.executable, "-c", program)),), kind=kind, **more)

    def runner(self, *stages: Stage) -> Runner:
        return Runner(stages, self.places, self.said.append)

    def run(self, *stages: Stage, jobs: int = 1) -> str:
        self.runner(*stages).run([stage.name for stage in stages], jobs)
        return self.done.read_text().strip()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_is_done_is_not_done_again(world: World) -> None:
    first, second = world.stage("first"), world.stage("second", "first")
    assert world.run(first) == "first"
    assert world.run(first, second) == "first second"
    assert world.said.count("first: kept from before") == 1


def test_other_settings_are_named_and_nothing_is_run(world: World) -> None:
    world.run(world.stage("first", settings={"size": 1, "same": 0}), world.stage("second", "first"))
    with pytest.raises(ReproduceError, match=r"first was done with other settings \(size was 1, is 2\)"):
        world.run(world.stage("first", settings={"size": 2, "same": 0}), world.stage("second", "first"))
    other = world.stage("first", settings={"size": 2})
    world.places.record("first").unlink()
    with pytest.raises(ReproduceError, match=r"second was done with other settings \(of a stage before it\)"):
        world.run(other, world.stage("second", "first"))
    assert world.done.read_text() == "first second first "


def test_a_result_that_is_gone_is_made_anew(world: World) -> None:
    made = world.places.root / "made"
    stage = world.stage("first", code=f"open({str(made)!r}, 'w')", produces=(made,))
    world.run(stage)
    made.unlink()
    assert world.run(stage) == "first first"
    assert made.exists()


def test_what_was_done_on_an_earlier_result_does_not_count(world: World) -> None:
    made = world.places.root / "made"
    first = world.stage("train/a", kind="train", code=f"open({str(made)!r}, 'w')", produces=(made,))
    scores, other = world.stage("evaluate/a", "train/a", kind="evaluate"), world.stage("other", "train/a")
    world.run(first, scores, other)
    made.unlink()
    with pytest.raises(ReproduceError, match=r"train/a has been done anew since other was. To follow, remove .*other"):
        world.run(first, scores, other)
    assert world.done.read_text().split() == ["train/a", "evaluate/a", "other", "train/a", "evaluate/a"]


def test_two_processes_do_not_do_one_stage(world: World) -> None:
    slow = world.stage("slow", code="import time\ntime.sleep(3)")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(world.run, slow)
        while "slow: begins" not in world.said:
            time.sleep(0.05)
        with pytest.raises(ReproduceError, match="another process is doing this"):
            world.run(slow)
        assert first.result() == "slow"


def test_a_program_that_is_not_there_is_told(world: World) -> None:
    stage = Stage("train/a", (), {}, (Command(("no-such-torchrun", "x")),), kind="train")
    with pytest.raises(ReproduceError, match="no-such-torchrun cannot be started"):
        world.run(stage)


def test_a_failure_stops_with_the_last_words_and_the_log(world: World) -> None:
    wrong = world.stage("wrong", code="raise SystemExit('the disk is full')")
    with pytest.raises(ReproduceError, match=r"wrong: exit status 1, last line: the disk is full .*wrong\.txt"):
        world.run(wrong, world.stage("next", "wrong"))
    assert not world.done.exists()
    assert world.run(world.stage("wrong"), world.stage("next", "wrong")) == "wrong next"


def test_a_stage_alone_wants_those_before_it(world: World) -> None:
    first, second = world.stage("first"), world.stage("second", "first")
    with pytest.raises(ReproduceError, match="second: first is not done yet"):
        world.runner(first, second).run(["second"], 1)


def test_trainings_run_side_by_side_and_one_that_fails_stops_no_other(world: World) -> None:
    # Each waits for the other's file: one after the other would never end.
    def wait(own: str, other: str) -> str:
        root = world.places.root
        return (
            f"import pathlib, time\npathlib.Path({str(root / own)!r}).touch()\nfor _ in range(600):\n"
            f"    if pathlib.Path({str(root / other)!r}).exists(): break\n    time.sleep(0.05)\n"
            "else: raise SystemExit(9)"
        )

    stages = [
        world.stage("train/a", kind="train", code=wait("a", "b")),
        world.stage("train/b", kind="train", code=wait("b", "a") + "\nraise SystemExit('b broke')"),
        world.stage("train/c", kind="train"),
        *(world.stage(f"evaluate/{name}", f"train/{name}", kind="evaluate") for name in "abc"),
        world.stage("report", kind="report"),
    ]
    began = time.monotonic()
    with pytest.raises(ReproduceError, match="train/b: exit status 1, last line: b broke"):
        world.run(*stages, jobs=2)
    assert time.monotonic() - began < 25
    *trained, first, second, last = world.done.read_text().split()
    assert sorted(trained) == ["train/a", "train/c"]
    assert [first, second, last] == ["evaluate/a", "evaluate/c", "report"]


def test_a_training_that_cannot_be_looked_at_stops_no_other(world: World) -> None:
    def refused() -> bool:
        raise ReproduceError("a finished run of another recipe")

    stages = [
        world.stage("train/a", kind="train", was_done=refused),
        world.stage("train/b", kind="train"),
        *(world.stage(f"evaluate/{name}", f"train/{name}", kind="evaluate") for name in "ab"),
        world.stage("report", kind="report"),
    ]
    with pytest.raises(ReproduceError, match="a finished run of another recipe"):
        world.run(*stages)
    assert world.done.read_text().split() == ["train/b", "evaluate/b", "report"]


def test_an_evaluation_in_part_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"incomplete": [{"key": "imagenet1k", "reason": "49,000 of 50,000"}]}))
    with pytest.raises(ReproduceError, match=r"1 task\(s\) were evaluated in part \(imagenet1k\)"):
        _whole(path)
    path.write_text(json.dumps({"incomplete": []}))
    assert _whole(path) == {}


def test_an_audit_that_wrote_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReproduceError, match=r"audit\.json: was not written"):
        audit_facts(tmp_path)


def test_what_a_job_of_a_cluster_has_done_is_taken_over(world: World) -> None:
    trained = world.stage("train/a", kind="train", was_done=lambda: True, read=lambda: {"step": 7})
    assert world.run(trained, world.stage("evaluate/a", "train/a", kind="evaluate")) == "evaluate/a"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("cc3m", "demo") else pytest.mark.long) for name in experiment_names()],
)
def test_every_packaged_experiment_can_be_planned(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    (tmp_path / "list.tsv").touch()
    given = str(tmp_path / "list.tsv") if experiment.list.kind == "file" else ""
    request = Request(experiment=experiment, output=tmp_path / "out", list=given, price=2.0)
    stages = build_stages(request)
    assert [stage.name.partition("/")[0] for stage in stages if "seed" not in stage.name] == [
        "list", "subset", "download", "audit", "reshard", "index", "report",
    ]  # fmt: skip
    assert all(stage.lines for stage in stages)
    assert len(stages) == 7 + 2 * len(experiment.methods) * len(experiment.seeds)
    recipe = load_recipe(*(lambda first, *rest: (first, rest))(*train_arguments(request, "neuclip-seed0")))
    assert recipe.data.train == str(tmp_path / "out/manifest.parquet")
    # What is called published is what the packaged recipe does.
    for field, value in experiment.published.settings.items():
        section, _, key = field.partition(".")
        assert getattr(getattr(recipe, section), key) == value, field
    assert estimate(request, "h100").lines
    assert not tmp_path.joinpath("out").exists(), "planning writes nothing"


def test_requests_that_cannot_be(tmp_path: Path) -> None:
    cc3m, demo = load_experiment("cc3m"), load_experiment("demo")
    with pytest.raises(ConfigError, match=r"--list.*Train_GCC-training.tsv"):
        Request(experiment=cc3m, output=tmp_path).check()
    with pytest.raises(ConfigError, match=r"--list.*makes its own"):
        Request(experiment=demo, output=tmp_path, list="x").check()
    with pytest.raises(ConfigError, match=r"--seeds"):
        Request(experiment=changed(demo, seeds=(1, 1)), output=tmp_path).check()
    small = load_experiment("small")
    for wrong, field in (
        ({"experiment": changed(demo, jobs=0)}, "--jobs"),
        ({"experiment": changed(small, jobs=2)}, "--jobs = 2: trainings would share GPUs"),
        ({"experiment": changed(demo, nodes=0)}, "--nodes"),
        ({"experiment": changed(demo, filter="nonsense")}, "--filter = 'nonsense'"),
        ({"experiment": changed(small, filter_options=("--fraction", "0.3"))}, "--filter-options"),
        ({"experiment": demo, "price": -1.0}, "--price"),
        ({"experiment": demo, "evaluation": tmp_path / "none"}, "--evaluation"),
        ({"experiment": demo, "overrides": ("seed=7",)}, "--set = 'seed=7'.*Use --seeds"),
    ):
        with pytest.raises(ConfigError, match=field):
            Request(output=tmp_path, **wrong).check()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"objective.name|EXPERIMENT"):
        load_experiment("cc4m")
    stages = build_stages(Request(experiment=demo, output=tmp_path))
    assert chosen(stages, (), "download") == ["list", "subset", "download"]
    assert chosen(stages, ("train",), "")[0] == "train/openclip-seed0"
    with pytest.raises(ConfigError, match=r"--until = 'index'.*Give one of the two"):
        chosen(stages, ("train",), "index")
    with pytest.raises(ConfigError, match=r"--until = 'trian'.*Stages: list, subset, download"):
        chosen(stages, (), "trian")


def test_other_evaluation_sets_are_another_evaluation(tmp_path: Path) -> None:
    """Else scores on the first would be kept for the second."""
    demo, keys = load_experiment("demo"), set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        request = Request(experiment=demo, output=tmp_path, evaluation=tmp_path / name)
        keys.add(evaluate_stage(request, "openclip-seed0").key([]))
    assert len(keys) == 2
