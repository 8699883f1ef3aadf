"""A model planned without memory, filled block by block, and parts of it locked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neuclip_scale.config import ConfigError, Recipe, load_recipe
from neuclip_scale.models.building import build_model, create_model, fill, filled_blocks, plan_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.layers import Layer, parameter_layers
from neuclip_scale.models.presets import PRESETS


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("demo", overrides)


@pytest.mark.parametrize("preset", ["demo", "RN50"])
def test_a_plan_takes_no_memory_and_no_block_comes_before_it_is_asked_for(preset: str) -> None:
    config = recipe(**{"model.preset": preset, "objective.name": "siglip"})
    torch.manual_seed(3)
    expected = build_model(config).state_dict()
    model = plan_model(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    torch.manual_seed(3)
    blocks = list(model.blocks())
    for number, part in enumerate(filled_blocks(model)):
        assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
        for later in blocks[number + 1 :]:
            assert all(parameter.is_meta for parameter in later.parameters())
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_filling_leaves_values_that_are_there() -> None:
    model = build_model(recipe(**{"model.preset": "toy"}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fill(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_are_numbered_from_the_pixels_and_words_up() -> None:
    layers = parameter_layers(plan_model(recipe()))  # 4 and 2 blocks
    assert layers["visual.conv1.weight"] == layers["visual.ln_pre.bias"] == Layer("image", 0, 5)
    assert layers["visual.transformer.resblocks.3.mlp.c_fc.weight"] == Layer("image", 4, 5)
    assert layers["visual.ln_post.weight"] == layers["visual.proj"] == Layer("image", 5, 5)
    assert layers["token_embedding.weight"] == layers["positional_embedding"] == Layer("text", 0, 3)
    assert layers["transformer.resblocks.0.attn.in_proj_weight"] == Layer("text", 1, 3)
    assert layers["text_projection"] == layers["ln_final.weight"] == Layer("text", 3, 3)
    assert layers.keys() == {name for name, _ in plan_model(recipe()).named_parameters()} - {"logit_scale"}
    resnet = parameter_layers(plan_model(recipe(**{"model.preset": "RN50"})))
    assert resnet["visual.bn2.weight"].number == 0
    assert resnet["visual.layer3.5.conv1.weight"] == Layer("image", 3, 5)
    assert resnet["visual.attnpool.q_proj.weight"] == Layer("image", 5, 5)


def test_layers_of_another_librarys_tower() -> None:
    options = {"model.image_tower": "vit_tiny_patch16_224", "model.image_size": 32}
    layers = parameter_layers(plan_model(recipe(**options)))
    assert layers["visual.trunk.patch_embed.proj.weight"].number == 0
    assert layers["visual.trunk.blocks.11.attn.qkv.weight"].number == 12
    last = layers["visual.head.proj.weight"]
    assert last.number == last.last > 12


@pytest.mark.parametrize(
    ("config", "norm"),
    [
        (
            {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            "final_layer_norm",
        ),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}, "ln_f"),
    ],
)
def test_the_last_norm_of_a_transformers_encoder_is_in_its_last_layer(
    tmp_path: Path, config: dict[str, Any], norm: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 50, "pad_token_id": 0}))
    model = create_model(PRESETS["demo"], text_tower=str(tmp_path))
    layers = parameter_layers(model)
    assert layers[f"text.transformer.{norm}.weight"] == layers["text.proj.weight"] == Layer("text", 3, 3)
    numbers = {layer.number for layer in layers.values() if layer.tower == "text"}
    assert numbers == {0, 1, 2, 3}


def trained(model: CLIP) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_locked_tower_rests_and_its_last_layers_can_train() -> None:
    whole = build_model(recipe(**{"model.lock": "image", "model.dropout": 0.5})).train()
    assert not any(name.startswith("visual.") for name in trained(whole))
    assert "token_embedding.weight" in trained(whole)
    assert "logit_scale" in trained(whole)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 9, (2, 16))
    first, second = whole(images, tokens), whole(images, tokens)
    assert torch.equal(first.image_features, second.image_features), "no dropout in a tower at rest"
    assert not torch.equal(first.text_features, second.text_features)
    assert not first.image_features.requires_grad
    part = build_model(recipe(**{"model.lock": "image", "model.unlocked_layers": 2, "model.dropout": 0.5})).train()
    visual = {name for name in trained(part) if name.startswith("visual.")}
    assert {name.split(".")[1] for name in visual} == {"transformer", "ln_post", "proj"}
    assert all("resblocks.3" in name for name in visual if "transformer" in name)
    assert part.visual.training
    most = build_model(recipe(**{"model.lock": "image", "model.unlocked_layers": 5}))
    assert {name for name, _ in most.named_parameters()} - trained(most) == {
        "visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight",
        "visual.ln_pre.weight", "visual.ln_pre.bias",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"unlocked_layers.*6.*has 6 layers.*at most 5"):
        build_model(recipe(**{"model.lock": "image", "model.unlocked_layers": 6}))
