"""Parameter groups, optimizers of other libraries, and schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuclip_scale.config import ConfigError, OptimConfig, check_recipe, load_recipe
from neuclip_scale.engines import Engine, create_engine
from neuclip_scale.models.building import build_model, create_model
from neuclip_scale.models.presets import get_preset
from neuclip_scale.optim import create_optimizer, parameter_groups, schedule_factor, set_learning_rates


def groups_by_name(**overrides: Any) -> dict[str, tuple[float, float]]:
    """Parameter -> (peak learning rate, weight decay)."""
    recipe = load_recipe("demo", {"model.preset": "toy", **overrides})
    model = build_model(recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, recipe.optim)
    return {names[id(p)]: (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_the_default_is_three_groups_as_in_open_clip() -> None:
    found = groups_by_name(**{"optim.learning_rate": 1e-3, "optim.weight_decay": 0.2})
    assert set(found.values()) == {(1e-3, 0.2), (1e-3, 0.0), (2e-3, 0.0)}
    assert found["logit_scale"] == (2e-3, 0.0)
    assert found["visual.ln_post.weight"] == found["transformer.resblocks.0.mlp.c_fc.bias"] == (1e-3, 0.0)
    assert found["token_embedding.weight"] == (1e-3, 0.2)


def test_towers_and_layers_have_their_own_rates() -> None:
    found = groups_by_name(**{
        "optim.learning_rate": 1e-3, "optim.weight_decay": 0.2, "optim.image.layer_decay": 0.5,
        "optim.image.learning_rate_factor": 0.1, "optim.text.weight_decay_factor": 2.0, "model.lock": "image",
        "model.unlocked_layers": 3,
    })  # fmt: skip
    assert found["visual.proj"] == pytest.approx((1e-4, 0.2))
    assert found["visual.transformer.resblocks.1.mlp.c_fc.weight"] == pytest.approx((5e-5, 0.2))
    assert found["visual.transformer.resblocks.0.mlp.c_fc.bias"] == pytest.approx((2.5e-5, 0.0))
    assert "visual.conv1.weight" not in found
    assert found["text_projection"] == pytest.approx((1e-3, 0.4))


@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "adopt", "sgd", "adafactorbv"])
def test_optimizers_of_timm_take_the_recipes_options(name: str) -> None:
    recipe = load_recipe("demo", {"model.preset": "toy", "optim.name": name, "optim.betas": [0.8, 0.95]})
    model = build_model(recipe)
    optimizer = create_optimizer(model, recipe.optim)
    set_learning_rates(optimizer, 0.5, constant_temperature=False, temperature_dropped=False)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert all(tuple(group["betas"]) == (0.8, 0.95) for group in optimizer.param_groups if "betas" in group)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # the first of adopt only measures
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adan", "adamp", "laprop", "nadamlegacy", "adafactorbv", "lamb", "muon"])
def test_what_an_optimizer_keeps_comes_back_to_the_bit(name: str) -> None:
    """Also steps counted in Python, whose powers have more digits than a tensor's, and moments in bf16."""
    config = load_recipe("demo", {"model.preset": "toy", "optim.name": name, "engine.device": "cpu"})

    def started() -> Engine:
        torch.manual_seed(0)
        return create_engine(build_model(config), config, torch.device("cpu"))

    def go_on(engine: Engine, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in engine.module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            engine.step(0.0)

    whole = started()
    go_on(whole, range(4))
    saved = {key: {name: part.clone() for name, part in kept.items()} for key, kept in whole.named_state()}
    scalars = whole.scalar_state()
    go_on(whole, range(4, 7))
    resumed = started()
    resumed.load_named_state(lambda key: dict(saved[key]))
    resumed.load_scalar_state(scalars)
    go_on(resumed, range(4, 7))
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("kron", "what it keeps are lists"),
        ("adahessian", "it needs second derivatives"),
        ("fusedadam", "it cannot be made here .*(CUDA|apex)"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_before_it_trains(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.name = '{name}': {problem}"):
        create_optimizer(create_model(get_preset("toy")), OptimConfig(name=name))


def test_an_unknown_optimizer_is_an_error_with_the_known_ones() -> None:
    recipe = load_recipe("demo", {"model.preset": "toy", "optim.name": "adamq"})
    with pytest.raises(ConfigError, match=r"optim\.name = 'adamq'.*lamb"):
        create_optimizer(build_model(recipe), recipe.optim)


def test_schedules_are_functions_of_the_step() -> None:
    cosine = OptimConfig(warmup_steps=2)
    assert [schedule_factor(step, 6, cosine) for step in range(6)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    cooldown = OptimConfig(warmup_steps=2, schedule="cooldown", cooldown_steps=3)
    assert [schedule_factor(step, 8, cooldown) for step in range(9)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    square = OptimConfig(warmup_steps=0, schedule="cooldown", cooldown_steps=1, cooldown_power=2.0)
    assert [schedule_factor(step, 3, square) for step in range(3)] == [1, 1, 0.25]
    assert schedule_factor(7, 9, OptimConfig(warmup_steps=0, schedule="constant")) == 1
    for field, value in (("model.unlocked_layers", 2), ("model.pretrained_towers", "image")):
        with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
            check_recipe(load_recipe("demo", {field: value}))
    for schedule, steps in (("cooldown", 0), ("cosine", 5)):
        recipe = load_recipe("demo", {"optim.schedule": schedule, "optim.cooldown_steps": steps})
        with pytest.raises(ConfigError, match=r"optim\.cooldown_steps"):
            check_recipe(recipe)
