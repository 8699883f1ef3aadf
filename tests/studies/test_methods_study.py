"""`neuclip study methods`: the plan, equal budgets, and a study that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import held_out

from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.studies.methods.plan import (
    Choice,
    arms,
    base_recipe,
    meant_to_differ,
    planned,
    steps_for_samples,
    steps_for_seconds,
    tuning_runs,
)
from neuclip_scale.studies.methods.running import StudyError, command, run_study
from neuclip_scale.studies.methods.settings import MethodsStudy


def study(output: Path, **changes: Any) -> MethodsStudy:
    values = {"methods": ("openclip", "neuclip"), "seeds": (0, 1), "larger": ("openclip",), "larger_factor": 4}
    return MethodsStudy(output=output, **{**values, **changes})


def test_larger_batches_see_as_many_pairs_in_fewer_steps(tmp_path: Path) -> None:
    asked = study(tmp_path)
    recipe = base_recipe(asked)
    steps = steps_for_samples(asked, recipe)
    assert steps == {"openclip": 600, "neuclip": 600, "openclip-x4": 150}
    runs = planned(asked, recipe, "samples", steps)
    assert [(run.seed, run.arm.name) for run in runs[:4]] == [
        (0, "openclip"), (0, "neuclip"), (0, "openclip-x4"), (1, "openclip"),
    ]  # fmt: skip
    larger = runs[2].overrides
    assert larger["train.global_batch_size"] == 1024
    assert larger["train.micro_batch_size"] == 256, "the encoders' memory stays that of the others"
    assert larger["optim.learning_rate"] == pytest.approx(2 * recipe.optim.learning_rate)
    assert len({run.folder for run in runs}) == len(runs)
    with pytest.raises(ConfigError, match="not a multiple of larger_factor = 7"):
        steps_for_samples(study(tmp_path, larger_factor=7), recipe)


def test_a_variant_is_a_method_with_fields_of_its_own(tmp_path: Path) -> None:
    text = "mix:neuclip-queue:objective.queue.batch_weight=0.5,optim.learning_rate=2e-3"
    asked = study(tmp_path, variants=(text,), overrides=("optim.learning_rate=5e-4",))
    recipe = base_recipe(asked)
    run = planned(asked, recipe, "samples", steps_for_samples(asked, recipe))[3]
    assert (run.arm.name, run.overrides["objective.name"]) == ("mix", "neuclip-queue")
    # What the arm says wins over what holds for all: it comes last.
    assert [word for word in command(asked, run) if "learning_rate" in word][-1] == "optim.learning_rate=2e-3"
    for wrong in ("mix", "mix:neuclip", "mix:neuclip:lr", ":neuclip:a.b=1"):
        with pytest.raises(ConfigError, match="not LABEL:METHOD"):
            arms(study(tmp_path, variants=(wrong,)))
    with pytest.raises(ConfigError, match="two arms have this name"):
        arms(study(tmp_path, variants=("openclip:openclip:seed=1",)))


def test_what_arms_are_given_is_meant_to_differ(tmp_path: Path) -> None:
    variants = ("mix:neuclip-queue:objective.queue.batch_weight=0.5,optim.clip_grad_norm=2",)
    meant = meant_to_differ(study(tmp_path, variants=variants))
    assert {"train.num_steps", "train.global_batch_size", "optim.learning_rate", "objective.name"} <= meant
    assert {"objective.queue.batch_weight", "optim.clip_grad_norm"} <= meant
    assert "optim.weight_decay" not in meant


def test_equal_wall_clock_gives_each_arm_the_steps_of_its_own_speed(tmp_path: Path) -> None:
    asked = study(tmp_path)
    recipe = base_recipe(asked)

    def summary(seconds: float, speed: float) -> dict[str, Any]:
        return {"train_seconds": seconds, "samples_per_second": speed}

    summaries = {
        "openclip": [summary(100, 512.0), summary(100, 256.0), summary(100, 512.0)],
        "neuclip": [summary(200, 256.0)],
        "openclip-x4": [summary(100, 1024.0)],
    }
    steps, seconds = steps_for_seconds(asked, recipe, summaries)
    assert (seconds, steps) == (100, {"openclip": 200, "neuclip": 100, "openclip-x4": 100})


def test_every_run_gets_the_studys_data_and_overrides(tmp_path: Path) -> None:
    asked = study(tmp_path, data="/d a/x", overrides=("train.num_steps=8",), launcher="torchrun --nproc-per-node 2")
    recipe = base_recipe(asked)
    run = planned(asked, recipe, "samples", steps_for_samples(asked, recipe))[1]
    words = command(asked, run)
    assert words[:6] == ["torchrun", "--nproc-per-node", "2", "neuclip", "train", "demo"]
    assert 'data.train="/d a/x"' in words
    assert words[-1] == "train.num_steps=8"
    assert 'objective.name="neuclip"' in words


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training shards and an evaluation folder."""
    folder = tmp_path_factory.mktemp("methods")
    write_synthetic_shards(folder / "shards", num_samples=40, samples_per_shard=20, image_size=40, seed=1)
    return folder / "shards", held_out(folder) / "retrieval"


def small(output: Path, data: tuple[Path, Path], *methods: str, seeds: tuple[int, ...] = (0, 1)) -> MethodsStudy:
    overrides = {
        "evaluation.data": json.dumps(str(data[1].parent)), "evaluation.normalizer_every_steps": 0,
        "train.num_steps": 4, "train.global_batch_size": 8, "data.num_workers": 0, "checkpoint.every_steps": 0,
        "objective.npn.num_prototypes": 20, "engine.device": "cpu",
    }  # fmt: skip
    listed = tuple(f"{key}={value}" for key, value in overrides.items())
    return MethodsStudy(
        output=output, data=str(data[0]), methods=methods, seeds=seeds, budgets=("samples",), larger=(),
        overrides=listed,
    )  # fmt: skip


def test_a_killed_study_goes_on_and_compares(data: tuple[Path, Path], tmp_path: Path) -> None:
    asked = small(tmp_path / "study", data, "openclip", "siglip")
    words = [sys.executable, "-m", "neuclip_scale", "study", "methods", "--output", str(asked.output)]
    words += ["--data", asked.data, "--methods", *asked.methods, "--seeds", "0", "1", "--budgets", "samples"]
    words += ["--larger", "--overrides", *asked.overrides]
    first = asked.output / "runs" / "samples" / "openclip" / "seed0" / "summary.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 200
        while not first.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    before = first.stat().st_mtime_ns
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert "openclip seed 0: kept from before" in done.stdout
    assert first.stat().st_mtime_ns == before
    result = json.loads((asked.output / "result.json").read_bytes())
    assert set(result["budgets"]) == {"samples"}
    assert (asked.output / "equal-samples" / "index.html").is_file()
    for method in asked.methods:
        for seed in asked.seeds:
            folder = asked.output / "runs" / "samples" / method / f"seed{seed}"
            assert json.loads((folder / "summary.json").read_bytes())["objective"] == method


@pytest.mark.long
def test_each_arm_trains_with_the_learning_rate_that_scored_best(data: tuple[Path, Path], tmp_path: Path) -> None:
    plain = small(tmp_path / "study", data, "openclip", seeds=(0,))
    asked = MethodsStudy(**{**vars(plain), "learning_rates": (1e-5, 1e-2), "tuning_steps": 2, "jobs": 2})
    told: list[str] = []
    assert run_study(asked, told.append).keys() == {"samples"}
    plan = json.loads((asked.output / "plan.json").read_bytes())
    scores, chosen = plan["tuning"]["openclip"], plan["chosen"]["openclip"]["learning_rate"]
    tuned = {}
    for rate in asked.learning_rates:
        run = asked.output / "runs" / "tuning" / "openclip" / f"lr{rate:g}"
        summary = json.loads((run / "summary.json").read_bytes())
        assert (summary["seed"], summary["step"]) == (1000, 2)
        retrieval = summary["evaluation"]["retrieval"]
        recalls = [*retrieval["image_to_text"].values(), *retrieval["text_to_image"].values()]
        tuned[f"lr{rate:g}"] = sum(recalls) / len(recalls)
    assert scores == pytest.approx(tuned)
    assert tuned[f"lr{chosen:g}"] == max(tuned.values())
    final = load_recipe(asked.output / "runs" / "samples" / "openclip" / "seed0" / "config.yaml")
    assert (final.optim.learning_rate, final.seed, final.train.num_steps) == (chosen, 0, 4)
    assert any(text.startswith(f"chosen for openclip: lr{chosen:g}") and "edge" in text for text in told)

    # What was trained before is kept only where the plan is still the same.
    changed = MethodsStudy(**{**vars(asked), "overrides": (*asked.overrides, "optim.weight_decay=0.3")})
    with pytest.raises(StudyError, match=r"was trained with another optim\.weight_decay"):
        run_study(changed, told.append)
    with pytest.raises(ConfigError, match="is one of the seeds that are reported"):
        run_study(MethodsStudy(**{**vars(asked), "seeds": (0, 1000)}), told.append)


def test_a_larger_batch_falls_and_is_tuned_over_as_many_pairs(tmp_path: Path) -> None:
    cooldown = ("optim.schedule=cooldown", "optim.cooldown_steps=120")
    asked = study(tmp_path, overrides=cooldown, learning_rates=(1e-3,), tuning_steps=3)
    recipe = base_recipe(asked)
    steps = steps_for_samples(asked, recipe)
    larger = planned(asked, recipe, "samples", steps)[2].overrides
    assert (larger["train.num_steps"], larger["optim.cooldown_steps"]) == (150, 30)
    tuning = tuning_runs(asked, recipe, steps)["openclip-x4"][Choice(1e-3)]
    assert tuning.overrides["train.num_steps"] == 1, "and not all of the steps"


def test_a_rate_that_an_arm_names_is_not_tuned_and_larger_batches_scale_it(tmp_path: Path) -> None:
    asked = study(tmp_path, learning_rates=(1e-3, 2e-3), variants=("own:neuclip:optim.learning_rate=5e-3",))
    recipe = base_recipe(asked)
    found = tuning_runs(asked, recipe, steps_for_samples(asked, recipe))
    assert found.keys() == {"openclip", "neuclip", "openclip-x4"}
    assert found["openclip-x4"][Choice(1e-3)].overrides["optim.learning_rate"] == pytest.approx(2e-3)
    assert len({run.folder for of_arm in found.values() for run in of_arm.values()}) == 6


def test_rho_is_chosen_where_there_is_one(tmp_path: Path) -> None:
    asked = study(
        tmp_path,
        learning_rates=(1e-3, 2e-3),
        rhos=(2.0, 4.0),
        variants=("own:neuclip:objective.rho=9.0", "all:neuclip:objective.rho=9.0,optim.learning_rate=1e-3"),
    )
    recipe = base_recipe(asked)
    steps = steps_for_samples(asked, recipe)
    found = tuning_runs(asked, recipe, steps)
    tried = {name: [choice.label for choice in of_arm] for name, of_arm in found.items()}
    rates = ["lr0.001", "lr0.002"]
    assert tried == {
        "openclip": rates,
        "openclip-x4": rates,
        "own": rates,
        "neuclip": ["lr0.001-rho2", "lr0.001-rho4", "lr0.002-rho2", "lr0.002-rho4"],
    }
    assert found["neuclip"][Choice(2e-3, 4.0)].overrides["objective.rho"] == 4.0
    runs = planned(asked, recipe, "samples", steps, {"neuclip": Choice(2e-3, 4.0)})
    assert {run.overrides.get("objective.rho") for run in runs if run.arm.name == "neuclip"} == {4.0}
    assert {run.overrides.get("objective.rho") for run in runs if run.arm.name == "openclip"} == {None}


def test_a_run_that_fails_is_named_with_its_last_words(data: tuple[Path, Path], tmp_path: Path) -> None:
    asked = small(tmp_path / "study", data, "openclip", seeds=(0,))
    broken = MethodsStudy(**{**vars(asked), "overrides": (*asked.overrides, "data.max_bad_fraction=2.0")})
    with pytest.raises(StudyError, match=r"seed0 \(exit status 2: error: data.max_bad_fraction = 2.0"):
        run_study(broken, lambda text: None)
