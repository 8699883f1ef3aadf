"""Towers from timm and transformers inside the model; nothing is downloaded."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuclip_scale.config import ConfigError, ModelConfig, Recipe
from neuclip_scale.models.building import build_model, create_model
from neuclip_scale.models.presets import PRESETS, ResNetConfig
from neuclip_scale.models.text import TransformersTower
from neuclip_scale.models.tokenizer import build_tokenizer
from neuclip_scale.models.vision import TimmTower

WORDS = "[PAD] [UNK] [CLS] [SEP] a cat dog photo of the sleeping . & [MASK]".split()  # noqa: SIM905


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT of two narrow layers: config and tokenizer, no weights."""
    from transformers import BertTokenizerFast

    config = {
        "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 12, "pad_token_id": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(tmp_path)
    return tmp_path


def _recipe(**values: Any) -> Recipe:
    return Recipe(model=ModelConfig(preset="demo", **values))


def _missing_gradients(model: torch.nn.Module, images: Tensor, tokens: Tensor) -> list[str]:
    output = model(images, tokens)
    (output.image_features @ output.text_features.T * output.logit_scale).square().sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", 32), ("test_convnext", 64), ("test_resnet", 64), ("test_efficientnet", 64)],
)
def test_timm_towers_train(name: str, size: int) -> None:
    model = build_model(_recipe(image_tower=name, image_size=size))
    assert model.image_size == size
    assert _missing_gradients(model, torch.randn(2, 3, size, size), torch.full((2, 16), 49407)) == []
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("visual.")} == {"trunk", "head"}


@pytest.mark.parametrize("tower", ["", "test_vit", "resnet"])
@pytest.mark.parametrize("own_text", [True, False])
def test_what_a_last_map_is_given_makes_the_features(encoder: Path, tower: str, own_text: bool) -> None:
    """Once they are shown; captions packed, where they can be."""
    preset = PRESETS["demo"]
    if tower == "resnet":
        preset = replace(preset, image=ResNetConfig(width=8, blocks=(1, 1, 1, 1), heads=4))
    model = create_model(
        preset, image_tower=tower.replace("resnet", ""), text_tower="" if own_text else str(encoder)
    ).eval()
    images, tokens = torch.randn(3, 3, model.image_size, model.image_size), torch.tensor([[2, 9, 3] + [0] * 9] * 3)
    tokens[1, 3:6], tokens[2, 1:3] = torch.tensor([4, 5, 3]), torch.tensor([3, 0])
    if own_text:
        tokens[tokens == 3] = 49407  # CLIP's end
    assert model(images, tokens).image_projection is None
    model.show_projections()
    packing = model.pack([3, 6, 2], images.device)
    assert (packing is not None) == own_text
    output = model(images, tokens, packing)
    widths = []
    for features, shown in (
        (output.image_features, output.image_projection), (output.text_features, output.text_projection)
    ):  # fmt: skip
        made = shown.inputs @ shown.matrix
        torch.testing.assert_close(torch.nn.functional.normalize(made, dim=-1), features)
        assert not made.requires_grad
        widths.append(shown.inputs.shape[1])
    assert tuple(widths) == model.projected_widths


def test_timm_dropout_and_checkpointing() -> None:
    tower = TimmTower("test_vit", 16, 32, dropout=0.5)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower(images).features, tower(images).features)
    torch.manual_seed(0)
    tower(images).features.sum().backward()
    plain = [parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None]
    tower.zero_grad()
    tower.set_grad_checkpointing(True)
    torch.manual_seed(0)
    tower(images).features.sum().backward()
    for a, b in zip(plain, [p.grad for p in tower.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b)


def test_timm_settings_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.grad_checkpointing = True.*test_resnet has batch norm"):
        TimmTower("test_resnet", 16, 64).set_grad_checkpointing(True)
    with pytest.raises(ConfigError, match=r"model.image_tower = 'test_resnet'.*proj_drop_rate"):
        TimmTower("test_resnet", 16, 64, dropout=0.1)


def test_transformers_tower_from_a_config_without_weights(encoder: Path) -> None:
    recipe = _recipe(text_tower=str(encoder))
    model, tokenizer = build_model(recipe), build_tokenizer(recipe.model)
    assert model.context_length == tokenizer.context_length == 12  # the encoder's positions, below the preset's 16
    tokens = tokenizer(["a cat &amp; a dog", "the  dog sleeping .", ""])
    assert tokens.shape == (3, 12)
    assert tokens[0].tolist()[:7] == [2, 4, 5, 12, 4, 6, 3]
    assert _missing_gradients(model, torch.randn(3, 3, 32, 32), tokens) == []
    text_keys = [key for key in model.state_dict() if key.startswith("text.")]
    assert "text.proj.weight" in text_keys
    assert all(key.startswith(("text.transformer.", "text.proj.")) for key in text_keys)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_the_features(encoder: Path, pooling: Any) -> None:
    tower = TransformersTower(str(encoder), 8, 12, pooling=pooling)
    tokens = torch.tensor([[2, 4, 5, 3]])
    padded = torch.nn.functional.pad(tokens, (0, 6))
    torch.testing.assert_close(tower(padded).features, tower(tokens).features)


def test_pooling_is_what_it_says(encoder: Path) -> None:
    tokens = torch.tensor([[2, 4, 5, 3, 0, 0]])
    mean, cls = TransformersTower(str(encoder), 8, 12), TransformersTower(str(encoder), 8, 12, pooling="cls")
    cls.load_state_dict(mean.state_dict())
    hidden = mean.transformer(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    torch.testing.assert_close(mean(tokens).features, mean.proj(hidden[:, :4].mean(dim=1)))
    torch.testing.assert_close(cls(tokens).features, cls.proj(hidden[:, 0]))


def test_transformers_dropout_is_the_recipes(encoder: Path) -> None:
    tokens = torch.tensor([[2, 4, 5, 3]])
    tower = TransformersTower(str(encoder), 8, 12)  # BERT's own default would be 0.1
    assert torch.equal(tower.train()(tokens).features, tower(tokens).features)
    tower = TransformersTower(str(encoder), 8, 12, dropout=0.5)
    assert not torch.equal(tower.train()(tokens).features, tower(tokens).features)


def test_transformers_checkpointing_gives_the_same_gradients(encoder: Path) -> None:
    tower, tokens = TransformersTower(str(encoder), 8, 12, dropout=0.3), torch.tensor([[2, 4, 5, 3]])
    gradients = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        tower.zero_grad()
        torch.manual_seed(0)
        tower(tokens).features.square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_saved_weights_of_an_encoder_are_used(encoder: Path, tmp_path: Path) -> None:
    source = TransformersTower(str(encoder), 8, 12)
    source.transformer.save_pretrained(tmp_path / "with_weights")
    loaded = TransformersTower(str(tmp_path / "with_weights"), 8, 12)
    for (name, a), b in zip(source.transformer.named_parameters(), loaded.transformer.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_weights_that_are_not_the_encoders_are_refused(encoder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("executed",))

    folder = tmp_path / "spoiled"
    TransformersTower(str(encoder), 8, 12).transformer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"model\.text_tower = .*spoiled.*SafetensorError"):
        TransformersTower(str(folder), 8, 12)
    weights.write_bytes(whole.replace(b"word_embeddings", b"WORD_EMBEDDINGS"))
    with pytest.raises(ConfigError, match=r"lack 1 parameters \(embeddings\.word_embeddings\.weight"):
        TransformersTower(str(folder), 8, 12)
    weights.unlink()
    torch.save({"a": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"UnpicklingError: Weights only load failed\)\. Give"):
        TransformersTower(str(folder), 8, 12)


def test_an_encoder_saved_without_its_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, pad_token_id=0)
    T5EncoderModel(config).save_pretrained(tmp_path)
    tower = TransformersTower(str(tmp_path), 8, 12)
    assert not any("decoder" in name for name, _ in tower.named_parameters())
    assert tower(torch.tensor([[3, 4, 1, 0]])).features.shape == (1, 8)


def test_encoder_decoder_gives_its_encoder(tmp_path: Path) -> None:
    config = {
        "model_type": "t5", "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
        "num_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = create_model(PRESETS["demo"], text_tower=str(tmp_path))
    assert model.context_length == 16
    assert not any("decoder" in name for name, _ in model.named_parameters())
    assert model(tokens=torch.tensor([[3, 4, 1, 0]])).text_features.shape == (1, model.embed_dim)


def test_an_encoder_without_padding_or_tokenizer_is_refused(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    config = json.loads((encoder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    with pytest.raises(ConfigError, match="no pad_token_id"):
        build_model(_recipe(text_tower=str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="no pad_token_id"):
        build_model(_recipe(text_tower=str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip_text_model"}))
    with pytest.raises(ConfigError, match=r"makes no encoder of it \(ValueError: Unrecognized configuration class"):
        build_model(_recipe(text_tower=str(folder)))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model.text_tower = .*no tokenizer"):
        build_tokenizer(ModelConfig(preset="demo", text_tower=str(folder)))


@pytest.mark.parametrize("change", [{"pad_token_id": 3}, {"vocab_size": 5}])
def test_a_tokenizer_that_does_not_fit_its_encoder_is_refused(encoder: Path, change: dict[str, int]) -> None:
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match="does not fit its config"):
        build_tokenizer(ModelConfig(preset="demo", text_tower=str(encoder)))


def test_the_tokenizer_can_be_sent_to_workers(encoder: Path) -> None:
    tokenizer = build_tokenizer(replace(ModelConfig(preset="demo"), text_tower=str(encoder)))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy("a photo of the cat"), tokenizer("a photo of the cat"))


@pytest.mark.parametrize("weights", [True, False])
def test_an_encoder_stored_in_halves_is_trained_in_fp32(encoder: Path, tmp_path: Path, weights: bool) -> None:
    source = TransformersTower(str(encoder), 8, 12).transformer.bfloat16()
    source.save_pretrained(tmp_path / "half")
    if not weights:
        (tmp_path / "half" / "model.safetensors").unlink()
    assert json.loads((tmp_path / "half" / "config.json").read_bytes())["dtype"] == "bfloat16"
    loaded = TransformersTower(str(tmp_path / "half"), 8, 12)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for a, b in zip(source.parameters(), loaded.transformer.parameters(), strict=True):
        assert not weights or torch.equal(a.float(), b)


def test_code_in_an_encoders_folder_is_never_run(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    folder.mkdir()
    (folder / "theirs.py").write_text(
        f"""from transformers import PretrainedConfig
from pathlib import Path

Path({str(ran)!r}).touch()


class TheirConfig(PretrainedConfig):
    model_type = "theirs"
"""
    )
    config = json.loads((encoder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    with pytest.raises(ConfigError, match=r"model.text_tower = .*transformers cannot read its config"):
        TransformersTower(str(folder), 8, 12)
    assert not ran.exists()


def test_positions_that_an_encoder_leaves_out_are_no_context(tmp_path: Path) -> None:
    config = {
        "model_type": "roberta", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 12, "pad_token_id": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tower = TransformersTower(str(tmp_path), 8, 77)
    assert tower.context_length == 10
    assert tower(torch.full((1, 10), 5)).features.isfinite().all()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        tower(torch.full((1, 11), 5))
