"""The two-tower model: outputs, single towers, precision, building from a recipe, refused combinations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from neuclip_scale.config import ConfigError, ModelConfig, ObjectiveConfig, Recipe
from neuclip_scale.models.building import build_model, create_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.presets import PRESETS, get_preset
from neuclip_scale.models.tokenizer import CLIPTokenizer
from neuclip_scale.models.transformer import ResidualAttentionBlock

TINY = replace(
    PRESETS["demo"],
    embed_dim=32,
    image=replace(PRESETS["demo"].image, patch_size=16, width=32, layers=2, heads=2),
    text=replace(PRESETS["demo"].text, width=32, layers=2, heads=2),
)


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return create_model(TINY)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32), CLIPTokenizer(16)(["a cat", "two dogs on a sofa", ""])


def _demo(**values: object) -> Recipe:
    return Recipe(model=ModelConfig(preset="demo", **values))  # type: ignore[arg-type]


def test_features_are_unit_rows_and_the_scale_has_one_element(model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    output = model(*batch)
    for features in (output.image_features, output.text_features):
        assert features.shape == (3, 32)
        assert features.dtype is torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    assert output.logit_scale.shape == model.logit_scale.shape == (1,)
    torch.testing.assert_close(output.logit_scale, torch.tensor([1 / 0.07]))
    assert output.logit_bias is None


def test_each_tower_alone_gives_what_it_gives_with_the_other(model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    images, tokens = batch
    both, image, text = model(images, tokens), model(images=images), model(tokens=tokens)
    assert torch.equal(image.image_features, both.image_features)
    assert torch.equal(text.text_features, both.text_features)
    assert image.text_features is None
    assert text.image_features is None
    assert torch.equal(model().logit_scale, both.logit_scale)


def test_every_parameter_gets_a_gradient(batch: tuple[Tensor, Tensor]) -> None:
    model = create_model(TINY, logit_bias_init=-10.0)
    output = model(*batch)
    logits = output.image_features @ output.text_features.T * output.logit_scale + output.logit_bias
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_padding_and_shorter_batches_do_not_change_text_features(model: CLIP) -> None:
    tokens = CLIPTokenizer(16)("a cat")
    features = model(tokens=tokens).text_features
    torch.testing.assert_close(model(tokens=tokens[:, :4]).text_features, features)
    garbage = tokens.clone()
    garbage[:, 4:] = 17  # after the end token
    torch.testing.assert_close(model(tokens=garbage).text_features, features)


def test_blocks_have_the_dtype_of_autocast(model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    found: list[torch.dtype] = []
    for tower in (model.visual, model.transformer):
        for block in (part for part in tower.modules() if isinstance(part, ResidualAttentionBlock)):
            block.register_forward_pre_hook(lambda block, inputs: found.append(inputs[0].dtype))
    model(*batch)
    assert set(found) == {torch.float32}
    found.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch)
    assert set(found) == {torch.bfloat16}


def test_features_stay_float32_under_autocast_and_in_bfloat16(model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    exact = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*batch)
    low = model.bfloat16()(*batch)
    for output in (mixed, low):
        assert output.logit_scale.dtype is torch.float32
        for features, reference in zip(output[:2], exact[:2], strict=True):
            assert features.dtype is torch.float32
            torch.testing.assert_close(features, reference, atol=0.03, rtol=0)


def test_checkpointing_both_towers_gives_the_same_gradients(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = create_model(TINY, dropout=0.3)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        output = model(*batch)
        (output.image_features @ output.text_features.T).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_build_model_follows_the_recipe() -> None:
    recipe = Recipe(
        model=ModelConfig(preset="demo", image_size=64, dropout=0.1, grad_checkpointing=True),
        objective=ObjectiveConfig(temperature_init=0.03),
    )
    model = build_model(recipe)
    assert (model.image_size, model.context_length, model.embed_dim) == (64, 16, PRESETS["demo"].embed_dim)
    assert model.image_mean == PRESETS["demo"].image_mean
    assert math.isclose(model.logit_scale.item(), -math.log(0.03), rel_tol=1e-6)
    assert model.visual.transformer.grad_checkpointing
    assert model.transformer.grad_checkpointing
    assert model.visual.transformer.resblocks[0].dropout.p == 0.1
    assert model.transformer.resblocks[0].dropout.p == 0.1


def test_the_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(7)
    first = build_model(_demo()).state_dict()
    torch.manual_seed(7)
    second = build_model(_demo()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_towers_keep_names_and_gradients(batch: tuple[Tensor, Tensor], checkpointing: bool) -> None:
    # Traced and differentiated by torch.compile; generating C++ as well would take a minute.
    torch.manual_seed(0)
    model = create_model(TINY)
    names = list(model.state_dict())

    def gradients() -> list[Tensor]:
        model.zero_grad()
        output = model(*batch)
        (output.image_features @ output.text_features.T).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing(checkpointing)
    model.compile_towers(backend="aot_eager")
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("packed", [False, True])
def test_whole_towers_are_recorded_as_cuda_graphs(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    modes: dict[nn.Module, str | None] = {}
    marks: list[None] = []
    monkeypatch.setattr(nn.Module, "compile", lambda part, mode=None, **options: modes.update({part: mode}))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    model = create_model(TINY)
    model.packs_captions = packed
    model.compile_towers()
    model.begin_step()
    assert set(modes.values()) == {None}
    assert not marks
    model.compile_towers(cuda_graphs=True)
    model.begin_step()
    assert len(marks) == 1
    assert modes[model.visual] == "reduce-overhead"
    text = dict.fromkeys(model.transformer.resblocks) if packed else {model.transformer: "reduce-overhead"}
    assert modes == {model.visual: "reduce-overhead", **text}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "RN50", "cuda_graphs": True, "compile": True}, r"model.cuda_graphs = True.*BatchNorm.*Turn it off"),
        (
            {"preset": "demo", "image_tower": "test_resnet", "cuda_graphs": True, "compile": True},
            r"model.cuda_graphs = True.*BatchNorm.*Turn it off",
        ),
        ({"preset": "ViT-B32"}, r"model.preset = 'ViT-B32'.*ViT-B-32"),
        ({"preset": "demo", "image_size": 33}, r"model.image_size = 33.*Use 32 or 40"),
        ({"preset": "demo", "image_size": 5}, r"model.image_size = 5.*Use 8"),
        ({"preset": "demo", "dropout": 1.0}, r"model.dropout = 1.0"),
        ({"preset": "RN50", "image_size": 100}, r"model.image_size = 100.*Use 96 or 128"),
        ({"preset": "RN50", "dropout": 0.1}, r"model.dropout = 0.1.*no transformer blocks"),
        ({"preset": "RN50", "grad_checkpointing": True, "compile": True}, r"model.compile = True"),
        ({"preset": "demo", "image_tower": "vit_bas_patch16_224"}, r"no such model.*vit_base_patch16_224"),
        (
            {"preset": "demo", "text_tower": "/nonexistent/encoder"},
            r"model.text_tower = '/nonexistent/encoder'",
        ),
    ],
)
def test_refused_combinations_name_the_field_and_the_remedy(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_model(Recipe(model=ModelConfig(**values)))  # type: ignore[arg-type]


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"objective.temperature_init = 0"):
        create_model(TINY, temperature_init=0.0)


def test_unknown_preset_without_a_near_match_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"Presets: ViT-B-32"):
        get_preset("zzz")
