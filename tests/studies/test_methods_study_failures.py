"""`neuclip study methods` where runs fail, diverge, are killed or cut off, and where a study is extended or moved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuclip_scale import cli
from neuclip_scale.config import ConfigError
from neuclip_scale.studies.methods.plan import base_recipe, steps_for_samples, steps_for_seconds
from neuclip_scale.studies.methods.running import StudyError, run_study
from neuclip_scale.studies.methods.settings import MethodsStudy

LAUNCHER = f"{sys.executable} {Path(__file__).with_name('stand_in_training.py')}"


def study(output: Path, *methods: str, **changes: Any) -> MethodsStudy:
    values: dict[str, Any] = {
        "methods": methods or ("openclip",), "seeds": (0,), "larger": (), "budgets": ("samples",),
        "launcher": LAUNCHER, "overrides": ("train.num_steps=8", "train.global_batch_size=16"),
    }  # fmt: skip
    return MethodsStudy(output=output, **{**values, **changes})


def words(asked: MethodsStudy) -> list[str]:
    given = {
        "methods": asked.methods, "seeds": asked.seeds, "budgets": asked.budgets, "overrides": asked.overrides,
        "variants": asked.variants, "larger": (), "launcher": (asked.launcher,), "output": (asked.output,),
    }  # fmt: skip
    options = ((f"--{name}", *map(str, values)) for name, values in given.items() if values or name == "larger")
    return ["study", "methods", *(word for option in options for word in option)]


def silent(text: str) -> None:
    """No report."""


def test_a_launcher_that_cannot_be_started_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for launcher, told in (("torchrum -n 2", "torchrum is not an executable program here"), ("a 'b", "No closing")):
        assert cli.main(words(study(tmp_path / "study", launcher=launcher))) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def folder_of(output: Path, arm: str, budget: str = "samples", seed: int = 0) -> Path:
    return output / "runs" / budget / arm / f"seed{seed}"


def test_finished_runs_are_compared_where_others_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = study(tmp_path, "openclip", "neuclip", variants=("bad:openclip:optim.weight_decay=0.3",))
    # What an earlier process wrote there, and one that is left behind still writes, is not this run's last word.
    bad = folder_of(tmp_path, "bad")
    bad.mkdir(parents=True)
    (bad / "console.txt").write_text("step 7/9 loss 1.0\n")
    assert cli.main(words(asked)) == 1
    error = capsys.readouterr().err
    assert "1 run(s) failed" in error
    assert "seed0 (exit status 2: error: this arm is bad)" in error
    assert (bad / "console-1.txt").read_text() == "step 7/9 loss 1.0\n"
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert "this arm is bad" in result["failures"]
    arms = {arm["name"] for arm in result["budgets"]["samples"]["arms"]}
    assert len(arms) == 2
    assert (tmp_path / "equal-samples" / "index.html").is_file()


def cut_off(folder: Path) -> None:
    summary = (folder / "summary.json").read_bytes()
    (folder / "summary.json").write_bytes(summary[: len(summary) // 2])


def no_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def torn_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("train: [")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"openclip/seed0/summary.json is not whole \(.*\); remove it, and the run goes on"),
        (no_config, r"openclip/seed0/config.yaml is missing, so what was trained is unknown; remove .*openclip/seed0"),
        (torn_config, r"openclip/seed0/config.yaml cannot be read \(not valid YAML"),
    ],
)
def test_a_damaged_run_is_a_sentence_and_the_others_go_on(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    run_study(study(tmp_path), silent)
    damage(folder_of(tmp_path, "openclip"))
    with pytest.raises(StudyError, match=message) as caught:
        run_study(study(tmp_path, seeds=(0, 1)), silent)
    assert caught.value.complete == {"samples": [folder_of(tmp_path, "openclip", seed=1)]}


def test_a_killed_run_does_not_go_on_with_other_arguments(tmp_path: Path) -> None:
    asked = study(tmp_path)
    run_study(asked, silent)
    killed = folder_of(tmp_path, "openclip")
    (killed / "summary.json").unlink()
    changed = study(tmp_path, overrides=(*asked.overrides, "optim.weight_decay=0.3"))
    for _ in ("with config.yaml alone", "with a checkpoint"):
        with pytest.raises(StudyError, match=r"was trained with another optim\.weight_decay; remove it"):
            run_study(changed, silent)
        (killed / "checkpoints" / "step_000000004").mkdir(parents=True, exist_ok=True)
    assert not (killed / "summary.json").exists()
    run_study(asked, silent)
    (killed / "config.yaml").unlink()
    (killed / "summary.json").unlink()
    with pytest.raises(StudyError, match="what was trained is unknown"):
        run_study(asked, silent)


def test_a_moved_study_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(study(tmp_path / "first"), silent)
    shutil.move(tmp_path / "first", tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    run_study(study(Path("second")), told.append)
    assert told == ["samples 1/1 openclip seed 0: kept from before"]


def test_what_diverges_is_the_worst_choice(tmp_path: Path) -> None:
    asked = study(tmp_path, learning_rates=(1e-3, 1e-2, 1.0))
    told: list[str] = []
    assert run_study(asked, told.append).keys() == {"samples"}
    assert any("chosen for openclip: lr0.01 (lr0.001: 0.10 %, lr0.01: 1.00 %, lr1: diverged)" in text for text in told)
    plan = json.loads((tmp_path / "plan.json").read_bytes())
    assert plan["tuning"]["openclip"] == {"lr0.001": pytest.approx(1e-3), "lr0.01": pytest.approx(1e-2), "lr1": None}
    diverged = tmp_path / "runs" / "tuning" / "openclip" / "lr1" / "console.txt"
    before = diverged.stat().st_mtime_ns
    run_study(asked, silent)
    assert diverged.stat().st_mtime_ns == before, "it would diverge again"

    high = study(tmp_path / "none", learning_rates=(1.0, 2.0), variants=("own:neuclip:optim.learning_rate=1e-3",))
    with pytest.raises(StudyError, match="openclip: every choice diverged; give lower --learning-rates") as caught:
        run_study(high, silent)
    assert caught.value.complete == {"samples": [folder_of(tmp_path / "none", "own")]}, "other arms go on"


def test_further_seeds_train_as_long_as_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = study(tmp_path, "openclip", "neuclip", budgets=("samples", "seconds"))
    assert cli.main(words(asked)) == 0
    plan = json.loads((tmp_path / "plan.json").read_bytes())
    # 8 steps of 16 at 64 and 32 samples a second are 2 and 4 s; 3 s are 12 and 6 steps.
    assert (plan["seconds"], plan["seconds_steps"]) == (3.0, {"openclip": 12, "neuclip": 6})
    capsys.readouterr()

    # Of seed 1 both are twice as fast, and a further arm has its steps by its own speed and the same time.
    more = study(tmp_path, "openclip", "neuclip", "rgcl-g", seeds=(0, 1), budgets=("samples", "seconds"))
    assert cli.main(words(more)) == 0
    again = json.loads((tmp_path / "plan.json").read_bytes())
    assert (again["seconds"], again["seconds_steps"]) == (3.0, {"openclip": 12, "neuclip": 6, "rgcl-g": 18})
    text = capsys.readouterr().out
    assert "steps of 3.0 s" in text
    assert "neuclip: 6 steps took 2.2 s (1.5 to 3.0), -25.0 % of the target." in text
    clock = json.loads((tmp_path / "result.json").read_bytes())["wall_clock"]
    assert clock["target"] == 3.0
    assert clock["arms"][1] == {"arm": "neuclip", "steps": 6, "seconds": [3.0, 1.5]}
    page = (tmp_path / "equal-seconds" / "index.html").read_text("utf-8")
    assert "-25.0 % of the target" in page
    compared = json.loads((tmp_path / "equal-seconds" / "compare.json").read_bytes())
    assert compared["verdict"] == "Recipes differ in the method and the seed and by design train.num_steps only."
    assert not [finding for finding in compared["findings"] if finding["kind"] in ("recipe", "data")]

    # The samples alone leave the plan of the other budget as it is; another time is refused.
    assert cli.main(words(study(tmp_path, "openclip", "neuclip"))) == 0
    assert json.loads((tmp_path / "plan.json").read_bytes())["seconds"] == 3.0
    assert cli.main([*words(more), "--seconds", "5"]) == 2
    assert "seconds = 5.0: plan.json has the steps of 3 seconds" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{")
    assert cli.main(words(more)) == 2
    assert "plan.json, by which it goes on, is not whole" in capsys.readouterr().err


def test_an_arm_without_a_speed_does_not_keep_the_others_from_equal_wall_clock(tmp_path: Path) -> None:
    asked = study(tmp_path, variants=("bad:neuclip:optim.weight_decay=0.3",), budgets=("samples", "seconds"))
    with pytest.raises(StudyError, match="budget seconds: bad has no finished run at equal samples") as caught:
        run_study(asked, silent)
    assert caught.value.complete["seconds"] == [folder_of(tmp_path, "openclip", "seconds")]


def test_sigterm_ends_the_trainings_which_save(tmp_path: Path) -> None:
    asked = study(tmp_path, variants=("slow:openclip:optim.weight_decay=0.3",), seeds=(0, 1))
    waiting = folder_of(tmp_path, "slow") / "waiting"
    program = [sys.executable, "-m", "neuclip_scale", *words(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while not waiting.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped by SIGTERM" in error
    assert "Traceback" not in error
    assert (waiting.parent / "checkpoints" / "step_000000001").is_dir(), "the study waited for it to save"
    assert not folder_of(tmp_path, "openclip", seed=1).exists(), "and began no other"


def test_fixed_steps_are_kept_and_others_follow_from_the_fixed_time(tmp_path: Path) -> None:
    asked = study(tmp_path, "openclip", "neuclip")
    recipe = base_recipe(asked)
    summaries = {name: [{"train_seconds": 9.0, "samples_per_second": 160.0}] for name in ("openclip", "neuclip")}
    saved = {"seconds": 3.0, "seconds_steps": {"neuclip": 7}}
    assert steps_for_seconds(asked, recipe, summaries, saved) == ({"openclip": 30, "neuclip": 7}, 3.0)


def test_what_is_not_planned_is_not_refused_and_a_seed_is_given_once(tmp_path: Path) -> None:
    ten = ("train.num_steps=10",)
    asked = study(tmp_path, "neuclip", larger=("openclip", "siglip"), overrides=ten)
    assert steps_for_samples(asked, base_recipe(asked)) == {"neuclip": 10}
    larger = study(tmp_path, "openclip", larger=("openclip",), overrides=ten)
    with pytest.raises(ConfigError, match="not a multiple of larger_factor"):
        steps_for_samples(larger, base_recipe(larger))
    for wrong, told in (
        ({"seeds": ()}, r"seeds = \[\]: nothing would be trained"),
        ({"jobs": 0}, "jobs = 0: too small"),
        ({"larger_factor": 0}, "larger_factor = 0: too small"),
        ({"seconds": -5.0}, "seconds = -5.0: too small"),
        ({"seconds": float("nan")}, "seconds = nan: too small, or no number"),
        ({"tuning_steps": -1}, "tuning_steps = -1: too small"),
        ({"larger": ("opencilp",)}, "larger = 'opencilp': there is no such method"),
    ):
        with pytest.raises(ConfigError, match=told):
            run_study(study(tmp_path, **wrong), silent)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"seeds = \[0, 1, 0\]: 0 is given twice"):
        run_study(study(tmp_path, seeds=(0, 1, 0)), silent)


def test_the_speed_of_a_run_of_other_settings_sets_no_steps(tmp_path: Path) -> None:
    assert cli.main(words(study(tmp_path))) == 0
    larger = ("train.num_steps=8", "train.global_batch_size=32")
    with pytest.raises(StudyError, match="budget seconds: openclip has no finished run at equal samples"):
        run_study(study(tmp_path, overrides=larger, budgets=("seconds",)), silent)
    assert not folder_of(tmp_path, "openclip", "seconds").exists()
