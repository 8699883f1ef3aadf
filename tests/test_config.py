"""Recipes: strict reading, overrides, round trip, and errors that name field, value and remedy."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuclip_scale.config import (
    ConfigError,
    Recipe,
    check_places,
    check_recipe,
    dump_recipe,
    load_recipe,
    local_batch_size,
    micro_batch_size,
    parse,
    recipe_names,
    schema,
    warnings_at_start,
)


def recipe(**overrides: Any) -> Recipe:
    """A recipe that can be run, with dotted names written with two underscores."""
    values: dict[str, Any] = {"train": {"num_steps": 10}}
    for name, value in overrides.items():
        section, field = name.split("__", 1)
        target = values.setdefault(section, {})
        if section == "objective" and field.startswith("npn__"):
            target, field = target.setdefault("npn", {}), field.removeprefix("npn__")
        target[field] = value
    return parse(Recipe, values)


def message(error: pytest.ExceptionInfo[ConfigError]) -> str:
    """The text, after checking that it names the field, the value and a remedy."""
    text = str(error.value)
    assert text.startswith(f"{error.value.field_name} = {error.value.value!r}: ")
    assert error.value.remedy
    assert text.endswith(error.value.remedy)
    return text


GRAPHS = {"model__cuda_graphs": True, "model__compile": True}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def test_round_trip() -> None:
    original = recipe(data__crop_scale=[0.5, 1.0], data__image_keys=["png"], objective__npn__num_prototypes=7)
    assert parse(Recipe, yaml.safe_load(dump_recipe(original))) == original
    assert original.data.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_can_be_run(name: str) -> None:
    loaded = load_recipe(name, {"data.train": "shards/{00000..00003}.tar", "run_dir": "runs/x"})
    check_recipe(loaded, world_size=1)
    assert parse(Recipe, yaml.safe_load(dump_recipe(loaded))) == loaded
    assert loaded.name


def test_there_is_a_demo_recipe() -> None:
    assert "demo" in recipe_names()


def test_every_field_has_help() -> None:
    """The text below a field is what `neuclip train RECIPE --help` shows for it."""
    source = Path(schema.__file__).read_text("utf-8")
    lines = [line.strip() for line in source.splitlines()]
    for section in sections(Recipe):
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.default_factory):
                continue
            index = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
            assert lines[index + 1].startswith('"""'), f"{section.__name__}.{field.name} has no help"


def sections(cls: Any) -> list[Any]:
    nested = [hint for hint in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(hint)]
    return [cls, *(section for each in nested for section in sections(each))]


# Reading


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({"trian": {}}, "trian", "Did you mean train?"),
        ({"train": {"num_step": 3}}, "train.num_step", "Did you mean train.num_steps?"),
        (
            {"objective": {"npn": {"prototypes": 3}}},
            "objective.npn.prototypes",
            "objective.npn.num_prototypes?",
        ),
        ({"optim": {"zzzzzz": 3}}, "optim.zzzzzz", "Known fields: betas, cooldown_power,"),
    ],
)
def test_unknown_key_names_the_nearest(values: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="there is no such field") as error:
        parse(Recipe, values)
    assert error.value.field_name == field
    assert hint in message(error)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("train__num_steps", "10", "Give a whole number."),
        ("train__num_steps", 1.5, "Give a whole number."),
        ("train__num_steps", True, "Give a whole number."),
        ("train__epochs", "many", "Give a number."),
        ("train__epochs", True, "Give a number."),
        ("train__precision", "fp8", "Choose from fp32, bf16, fp16."),
        ("model__pack_captions", 1, "Give true or false."),
        ("model__compile", 1, "Choose from auto, True, False."),
        ("model__preset", 32, "Give text (quote it)."),
        ("data__crop_scale", [0.5], "Expected tuple[float, float]"),
        ("data__crop_scale", 0.5, "Expected tuple[float, float]"),
        ("data__image_keys", "png", "Expected tuple[str, ...]"),
        ("data__image_keys", [1], "Give text (quote it)."),
        ("objective__name", "clip", "Choose from openclip"),
        ("objective__npn", 3, "Indent its fields below it."),
    ],
)
def test_wrong_type(field: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(**{field: value})
    assert remedy in message(error)
    assert error.value.field_name.startswith(field.replace("__", "."))


def test_yaml_reads_1e_3_as_text_but_the_recipe_does_not(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    path = write(tmp_path, "optim: {learning_rate: 1e-3, eps: 1.0e-6, weight_decay: 1}")
    optim = load_recipe(path, ["optim.temperature_learning_rate=2e-4"]).optim
    assert (optim.learning_rate, optim.eps, optim.weight_decay) == (1e-3, 1e-6, 1.0)
    assert isinstance(optim.weight_decay, float)
    assert optim.temperature_learning_rate == 2e-4


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.num_steps": 7, "objective.npn.num_prototypes": 64, "model.preset": "demo"},
        ["train.num_steps=7", "objective.npn.num_prototypes=64", "model.preset=demo"],
    ],
)
def test_overrides(tmp_path: Path, overrides: Any) -> None:
    path = write(tmp_path, "train: {num_steps: 3, global_batch_size: 64}")
    loaded = load_recipe(path, overrides)
    assert loaded.train.num_steps == 7
    assert loaded.train.global_batch_size == 64
    assert loaded.objective.npn.num_prototypes == 64
    assert loaded.model.preset == "demo"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.num_steps", "not of the form"),
        ("train.num_stpes=3", "no such field"),
        ("seed.x=3", "seed is not a section"),
        ("train=3", "must be a mapping"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        load_recipe(write(tmp_path, "seed: 1"), [override])
    message(error)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b", "not a mapping"),
        ("", "not a mapping"),
        ("model:\n", "mapping"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        load_recipe(write(tmp_path, text))
    message(error)


def test_missing_recipe_lists_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match=r"neither a packaged recipe nor a file\. Packaged recipes: .*demo") as error:
        load_recipe("nowhere.yaml")
    message(error)


# Checking


def test_batch_sizes() -> None:
    loaded = recipe(train__global_batch_size=64)
    assert (local_batch_size(loaded, 4), micro_batch_size(loaded, 4)) == (16, 16)
    assert micro_batch_size(recipe(train__global_batch_size=64, train__micro_batch_size=8), 4) == 8


@pytest.mark.parametrize(
    ("overrides", "world_size", "field", "hint"),
    [
        ({"train__global_batch_size": 1001}, 1, "train.global_batch_size", "Use 1000 or 1008"),
        ({"train__global_batch_size": 4}, 1, "train.global_batch_size", "Use 8, or "),
        ({"train__global_batch_size": 1, "data__num_streams": 1}, 1, "train.global_batch_size", "at least 2"),
        ({"data__num_streams": 8}, 3, "data.num_streams", "Use a world size that divides 8"),
        (
            {"train__global_batch_size": 90112, "data__num_streams": 1024},
            88,
            "data.num_streams",
            "Use 704, or a world size that divides 1024",
        ),
        ({"train__micro_batch_size": 600}, 2, "train.micro_batch_size", "Use at most 512"),
        ({"train__kept_micro_batches": -1}, 1, "train.kept_micro_batches", "zero or a positive number"),
        ({"train__kept_tower": "text"}, 1, "train.kept_tower", "a smaller train.micro_batch_size"),
        ({"train__kept_micro_batches": 2}, 1, "train.kept_micro_batches", "a smaller train.micro_batch_size"),
        (
            {"train__micro_batch_size": 128, "train__kept_micro_batches": 4},
            2,
            "train.kept_micro_batches",
            "Use at most 3, or",
        ),
        ({"train__num_steps": 0}, 1, "train.num_steps", "Give train.num_steps or train.epochs"),
        ({"objective__temperature_init": 2.0}, 1, "objective.temperature_init", "Move it inside"),
        ({"data__crop_scale": [1.0, 0.5]}, 1, "data.crop_scale", "Give [low, high]"),
        ({"model__dropout": 1.5}, 1, "model.dropout", "from 0 to 1"),
        ({"optim__learning_rate": 0}, 1, "optim.learning_rate", "positive number"),
        ({"optim__learning_rate": float("nan")}, 1, "optim.learning_rate", "positive number"),
        ({"data__weights": [1.0, float("nan")]}, 1, "data.weights[1]", "positive number"),
        ({"data__weights": [1.0, float("inf")]}, 1, "data.weights[1]", "positive number"),
        ({"objective__bias_init": float("nan")}, 1, "objective.bias_init", "Give a number"),
        ({"objective__amortized": {"rho": [8.5, float("nan")]}}, 1, "objective.amortized.rho[1]", "Give a number"),
        ({"optim__temperature_drop_at": float("nan")}, 1, "optim.temperature_drop_at", "zero or a positive number"),
        ({"data__max_image_pixels": 100_000_000}, 1, "data.max_image_pixels", "Give 89478485 at most"),
        ({"train__hang_timeout_seconds": 1e300}, 1, "train.hang_timeout_seconds", "Give 31536000 at most"),
        ({"data__num_workers": -1}, 1, "data.num_workers", "zero or a positive number"),
        ({"objective__npn__num_prototypes": 0}, 1, "objective.npn.num_prototypes", "positive number"),
        ({"checkpoint__keep": 0}, 1, "checkpoint.keep", "positive number"),
        ({"model__cuda_graphs": True}, 1, "model.cuda_graphs", "Set model.compile"),
        ({**GRAPHS, "engine__name": "fsdp2"}, 1, "model.cuda_graphs", "use engine.name=ddp"),
        ({**GRAPHS, "model__dropout": 0.1}, 1, "model.cuda_graphs", "set model.dropout to 0"),
        ({"train__precision": "fp16", "engine__device": "cpu"}, 1, "train.precision", "Use bf16 or fp32"),
    ],
)
def test_what_cannot_be_run(overrides: dict[str, Any], world_size: int, field: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_recipe(recipe(**overrides), world_size)
    assert error.value.field_name == field
    assert hint in message(error)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, []),
        ({"optim__warmup_steps": 599}, []),
        ({"optim__warmup_steps": 600}, ["optim.warmup_steps = 600 is as long as the run of 600 steps"]),
        ({"optim__schedule": "cooldown", "optim__cooldown_steps": 100}, []),
        ({"optim__schedule": "cooldown", "optim__cooldown_steps": 101}, ["optim.cooldown_steps = 101 begins before"]),
        ({"evaluation__every_steps": 5, "evaluation__data": "sets"}, []),
        ({"evaluation__every_steps": 5}, ["evaluation.every_steps does not count"]),
        ({"evaluation__at_samples": [9]}, ["evaluation.at_samples does not count"]),
        ({"evaluation__at_samples": [9], "evaluation__data": "sets"}, []),
        (
            {"evaluation__at_samples": [9, 1 << 40], "evaluation__data": "sets"},
            ["evaluation.at_samples = [1099511627776]: the run ends after"],
        ),
        ({"train__epochs": 2.0}, ["train.epochs = 2 does not count"]),
        ({"engine__fsdp": {"cpu_offload": True}}, ["engine.fsdp.* does not count with engine.name=ddp"]),
        ({"engine__fsdp": {"cpu_offload": True}, "engine__name": "fsdp2"}, []),
        ({"engine__deepspeed": {"config": "zero3"}}, ["engine.deepspeed.* does not count with engine.name=ddp"]),
    ],
)
def test_what_is_said_at_the_start(overrides: dict[str, Any], told: list[str]) -> None:
    found = warnings_at_start(recipe(**overrides), num_steps=600)
    assert len(found) == len(told)
    assert all(warning.startswith(beginning) for warning, beginning in zip(found, told, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_default_runs_on_every_divisor_of_its_streams(world_size: int) -> None:
    check_recipe(recipe(), world_size)


@pytest.mark.parametrize("field", ["run_dir", "data.train"])
def test_a_home_folder_that_no_shell_has_put_in_is_refused(field: str) -> None:
    given = load_recipe("demo", {"run_dir": "run", "data.train": "data"} | {field: "~/here"})
    with pytest.raises(ConfigError, match=rf"{field} = '~/here': would be a folder called ~. .*HOME"):
        check_places(given)


def test_a_seed_of_nanoseconds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"seed = 1764306000123456789.*below 2\^32"):
        check_recipe(parse(Recipe, {"seed": 1764306000123456789, "train": {"num_steps": 10}}))


def test_nothing_after_the_sign_is_the_empty_text() -> None:
    assert load_recipe("demo", ["evaluation.data="]).evaluation.data == ""
    with pytest.raises(ConfigError, match=r"train\.num_steps"):
        load_recipe("demo", ["train.num_steps="])
