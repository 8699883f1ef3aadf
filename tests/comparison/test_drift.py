"""Differences of recipes, code and machine, and the arms that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import ENVIRONMENT, write_run

from neuclip_scale.comparison import compare_runs, read_runs
from neuclip_scale.comparison.arms import group_arms
from neuclip_scale.comparison.drift import kind_of, recipe_drift
from neuclip_scale.comparison.sections import sections
from neuclip_scale.comparison.versions import code_differences, code_notes, machine_differences
from neuclip_scale.config import NEUTRAL, PLACES, Recipe, recipe_fields


def runs(folder: Path, *changes: dict[str, Any]) -> list[Any]:
    return read_runs([write_run(folder / str(number), **change) for number, change in enumerate(changes)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("seed", "seed"),
        ("objective.name", "method"),
        ("objective.npn.num_prototypes", "method"),
        ("optim.temperature_learning_rate", "method"),
        ("optim.temperature_drop_at", "method"),
        ("optim.learning_rate", "other"),
        ("train.global_batch_size", "other"),
        ("data.num_workers", "other"),
        ("model.preset", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_fields_are_sorted_with_their_values(tmp_path: Path) -> None:
    drift = recipe_drift(
        runs(
            tmp_path,
            {"seed": 1, "name": "a", "objective__name": "openclip"},
            {"seed": 2, "name": "b", "objective__name": "neuclip", "optim__learning_rate": 0.5},
        )
    )
    assert [(each.name, each.values) for each in drift.method] == [
        ("objective.name", {"0": "openclip", "1": "neuclip"})
    ]
    assert [(each.name, each.values) for each in drift.seed] == [("seed", {"0": 1, "1": 2})]
    assert [(each.name, each.values) for each in drift.other] == [("optim.learning_rate", {"0": 0.001, "1": 0.5})]
    assert drift.verdict.startswith("Recipes differ in more than the method: optim.learning_rate.")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "Recipes are equal."),
        ({"name": "another"}, "Recipes are equal."),
        ({"seed": 5}, "Recipes differ in the seed only."),
        ({"objective__rho": 9.0}, "Recipes differ in the method only."),
        ({"objective__rho": 9.0, "seed": 5}, "Recipes differ in the method and the seed only."),
    ],
)
def test_verdicts(tmp_path: Path, change: dict[str, Any], verdict: str) -> None:
    assert recipe_drift(runs(tmp_path, {}, change)).verdict == verdict


@pytest.mark.parametrize(
    "change",
    [
        {"resume": "never"},
        {"train__log_every_steps": 3},
        {"data__num_workers": 5},
        {"checkpoint__every_steps": 7},
        {"data__train": "/elsewhere"},
    ],
)
def test_what_changes_nothing_computed_is_listed_and_neither_a_finding_nor_an_arm(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    comparison = compare_runs(runs(tmp_path, {"seed": 0}, {"seed": 1, **change}))
    (name,) = (each.replace("__", ".") for each in change)
    assert [each.name for each in comparison.drift.neutral] == [name]
    assert comparison.drift.verdict == (
        f"Recipes differ in the seed only, but for what changes nothing computed: {name}."
    )
    assert comparison.comparable
    assert [len(arm.runs) for arm in comparison.arms] == [2]


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({}, {"resume": "/runs/other/checkpoints/step_2"}, "resume"),
        ({}, {"data__train": "/elsewhere", "num_bytes": 3}, "data.train"),
        (
            {"data__train": "/a::/b", "data__weights": [1, 2]},
            {"data__train": "/b::/a", "data__weights": [1, 2]},
            "data.train",
        ),
        ({}, {"evaluation__every_steps": 2}, "evaluation.every_steps"),
    ],
    ids=["a checkpoint's weights", "other shards", "other sources for the weights", "evaluation"],
)
def test_what_may_change_the_weights_is_a_finding(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], name: str
) -> None:
    comparison = compare_runs(runs(tmp_path, first, second))
    assert [each.name for each in comparison.drift.other] == [name]
    assert comparison.drift.neutral == []
    assert len(comparison.arms) == 2


def test_an_address_without_a_manifest_is_taken_as_written(tmp_path: Path) -> None:
    found = runs(tmp_path, {"data__train": "/a"}, {"data__train": "/b"}, {"data__train": "/b"})
    (tmp_path / "2" / "manifest.json").unlink()
    comparison = compare_runs(read_runs([run.path for run in found]))
    assert [each.name for each in comparison.drift.other] == ["data.train"]
    assert [[run.label for run in arm.runs] for arm in comparison.arms] == [["0"], ["1", "2"]]


def test_every_neutral_field_is_one_of_a_recipe() -> None:
    assert NEUTRAL.union(PLACES) < set(recipe_fields(Recipe()))


def test_differences_by_design_are_listed_and_no_finding(tmp_path: Path) -> None:
    found = runs(
        tmp_path,
        *({"seed": seed, "objective__name": "openclip", "steps": 6} for seed in (0, 1)),
        *({"seed": seed, "objective__name": "neuclip", "steps": 4} for seed in (0, 1)),
    )
    assert [finding.kind for finding in compare_runs(found).findings] == ["recipe", "data"]
    comparison = compare_runs(found, by_design=["train.num_steps", "objective.name", "no.such"])
    assert comparison.drift.verdict == ("Recipes differ in the method and the seed and by design train.num_steps only.")
    assert comparison.comparable
    assert [each.name for each in comparison.drift.by_design] == ["train.num_steps"]
    assert [each.name for each in comparison.drift.method] == ["objective.name"]
    assert comparison.data.notes[-1].startswith("By design (train.num_steps): Numbers of samples seen differ: 0 48,")
    assert [arm.name for arm in comparison.arms] == ["openclip", "neuclip"]
    (grid,) = (g for part in sections(comparison) for g in part.grids if g.title == "By design")
    assert grid.rows == [["train.num_steps", "6", "6", "4", "4"]]


def test_only_fields_of_length_excuse_other_numbers_of_samples(tmp_path: Path) -> None:
    stopped = {"steps": 3, "train__num_steps": 4, "optim__learning_rate": 0.5}
    comparison = compare_runs(runs(tmp_path, {"steps": 4}, stopped), by_design=["optim.learning_rate"])
    assert [finding.kind for finding in comparison.findings] == ["data"]


def test_more_than_the_method_is_the_first_finding(tmp_path: Path) -> None:
    comparison = compare_runs(runs(tmp_path, {}, {"optim__weight_decay": 0.3, "num_bytes": 7}))
    assert [finding.kind for finding in comparison.findings] == ["recipe", "data"]
    assert not comparison.comparable


def test_arms_are_recipes_without_the_seed(tmp_path: Path) -> None:
    changes = [{"seed": seed, "objective__name": name} for name in ("openclip", "neuclip") for seed in (0, 1)]
    arms = group_arms(runs(tmp_path, *changes))
    assert [(arm.name, [run.label for run in arm.runs]) for arm in arms] == [
        ("openclip", ["0", "1"]),
        ("neuclip", ["2", "3"]),
    ]


def test_arms_of_one_objective_are_named_by_what_differs(tmp_path: Path) -> None:
    arms = group_arms(runs(tmp_path, {}, {"objective__rho": 9.0}, {"objective__name": "openclip"}))
    assert [arm.name for arm in arms] == ["neuclip (objective.rho=8.5)", "neuclip (objective.rho=9.0)", "openclip"]


def test_a_recipe_of_an_older_version_is_filled_and_said_so(tmp_path: Path) -> None:
    found = runs(tmp_path, {}, {})
    path = tmp_path / "0" / "config.yaml"
    path.write_text(path.read_text("utf-8").replace("  schedule: cosine\n", ""), "utf-8")
    drift = recipe_drift(read_runs([run.path for run in found]))
    assert drift.verdict == "Recipes are equal."
    assert drift.notes == ["0: older than these fields, here at today's defaults: optim.schedule."]


def test_a_recipe_of_another_version_is_compared_as_written(tmp_path: Path) -> None:
    found = runs(tmp_path, {}, {})
    path = tmp_path / "0" / "config.yaml"
    path.write_text(path.read_text("utf-8") + "future:\n  field: 3\n", "utf-8")
    comparison = compare_runs(read_runs([run.path for run in found]))
    assert [(each.name, each.values) for each in comparison.drift.other] == [
        ("future.field", {"0": 3, "1": "not recorded"})
    ]
    assert "future" in comparison.runs[0].problems[0]


def test_code_and_machine_are_told_apart(tmp_path: Path) -> None:
    other = {
        "git": {"commit": "b" * 40, "dirty": True},
        "packages": ENVIRONMENT["packages"] | {"torch": "2.8.0"},  # type: ignore[operator]
        "hostname": "two",
        "world_size": 4,
        "gpus": ["H100"],
        "compiled_towers": True,
        "command": ["another"],
    }
    found = runs(tmp_path, {}, {"environment": other})
    assert [each.name for each in code_differences(found)] == ["git commit", "uncommitted changes", "package torch"]
    assert [each.name for each in machine_differences(found)] == ["hostname", "gpus", "world_size", "compiled_towers"]
    assert code_notes(found) == ["1: ran with uncommitted changes, so its commit does not say what code ran."]
    assert [finding.kind for finding in compare_runs(found).findings] == ["code"]


def test_another_machine_alone_is_no_discrepancy(tmp_path: Path) -> None:
    comparison = compare_runs(runs(tmp_path, {}, {"environment": {"hostname": "two"}}))
    assert comparison.comparable
    assert [each.name for each in comparison.machines] == ["hostname"]
