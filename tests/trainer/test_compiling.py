"""Whether a run compiles its towers where the recipe leaves that to the machine."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from neuclip_scale import load_recipe
from neuclip_scale.config import recipe_names
from neuclip_scale.engines import compiling
from neuclip_scale.models.building import plan_model

GPU = torch.device("cuda")
ZERO3 = {"engine.name": "deepspeed", "engine.deepspeed.config": "zero3"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One as torch would describe it, with a compiler that leaves functions as they are."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda end, device: arange(end))


def decided(device: torch.device = GPU, **fields: Any) -> bool:
    return compiling.compiles(load_recipe("demo", {"model.compile": "auto", **fields}), device)


def test_packaged_recipes_of_clip_s_transformers_leave_it_to_the_machine() -> None:
    left = {name for name in recipe_names() if load_recipe(name, {}).model.compile == "auto"}
    assert left == set(recipe_names()) - {"demo", "cc3m"}  # tiny towers, and a ResNet


def test_yes_and_no_are_the_recipe_s_word() -> None:
    for word in (True, False):
        assert compiling.compiles(load_recipe("demo", {"model.compile": word}), torch.device("cpu")) is word


@pytest.mark.usefixtures("gpu")
def test_clip_s_transformers_on_a_gpu_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert decided()
    assert decided(**{"engine.name": "fsdp2"})
    assert decided(**ZERO3 | {"engine.deepspeed.config": "zero1"})
    assert "towers on cuda are compiled" in caplog.text


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": torch.device("cpu")}, "on GPUs alone"),
        ({"model.preset": "RN50"}, "CLIP's own transformers"),
        ({"model.image_tower": "vit_tiny_patch16_224"}, "CLIP's own transformers"),
        (ZERO3, "ZeRO 3"),
    ],
)
def test_what_is_not_compiled_says_why(fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert not decided(**fields)
    assert "towers on c" in caplog.text
    assert reason in caplog.text


@pytest.mark.usefixtures("gpu")
def test_an_old_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    caplog.set_level(logging.INFO)
    assert not decided()
    assert "compute capability 7.5 is below 8.0" in caplog.text


@pytest.mark.usefixtures("gpu")
def test_a_machine_without_a_compiler_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: Any, **options: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch, "compile", fails)
    assert not decided()
    assert "packages gcc and python3-dev" in caplog.text
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: x)
    assert not decided()
    assert "programs are wrong here" in caplog.text


def test_where_one_rank_cannot_none_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe("demo", {"model.compile": True})
    assert compiling.compiles_everywhere(recipe, torch.device("cpu"))
    monkeypatch.setattr(compiling.distributed, "gather_objects", lambda own: [own, False, own, False])
    assert not compiling.compiles_everywhere(recipe, torch.device("cpu"))
    assert "these cannot and their logs say why: 1, 3" in caplog.text


def test_the_decision_takes_the_place_of_the_recipe_s_word() -> None:
    recipe = load_recipe("demo", {"model.compile": "auto", "model.preset": "toy"})
    assert not plan_model(recipe)._compiled
    assert not plan_model(recipe, compiled=False)._compiled
    assert plan_model(recipe, compiled=True)._compiled
