"""Reading open_clip's folders and files, and refusing what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neuclip_scale.config import ConfigError
from neuclip_scale.models.building import create_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.hf import HF_NAME, preset_from_hf, read_preset
from neuclip_scale.models.interop import (
    load_open_clip_state_dict,
    preset_from_open_clip,
    read_state_dict,
    to_open_clip_state_dict,
)
from neuclip_scale.models.loading import load_pretrained
from neuclip_scale.models.presets import PRESETS

MODEL_CFG = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CONFIG = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}


def _copy(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))


@pytest.fixture
def folder(open_clip: ModuleType, tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """What open_clip pushes to the hub, without the tokenizer, and the model it came from."""
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**_copy(MODEL_CFG)).eval()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return tmp_path, theirs


def _assert_same_features(ours: CLIP, theirs: torch.nn.Module) -> None:
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 49407, (2, 16))
    with torch.no_grad():
        output = ours(images, tokens)
        torch.testing.assert_close(output.image_features, theirs.encode_image(images, True), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.text_features, theirs.encode_text(tokens, True), atol=1e-5, rtol=0)


def test_a_folder_of_open_clip(folder: tuple[Path, torch.nn.Module]) -> None:
    path, theirs = folder
    ours = load_pretrained(path)
    assert not ours.training
    assert ours.image_mean == (0.5, 0.5, 0.5)
    assert ours.image_std == (0.25, 0.25, 0.25)
    _assert_same_features(ours, theirs)
    _assert_same_features(load_pretrained(path / "open_clip_model.safetensors"), theirs)


def test_a_training_checkpoint_of_open_clip(folder: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path, theirs = folder
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path / "epoch_3.pt")
    _assert_same_features(load_pretrained(path / "epoch_3.pt"), theirs)


def test_a_preset_named_by_the_caller(tmp_path: Path) -> None:
    model = create_model(PRESETS["demo"], logit_bias_init=-10.0)
    path = tmp_path / "weights.pt"
    torch.save(to_open_clip_state_dict(model), path)
    with pytest.raises(ConfigError, match=r"open_clip_config.json"):
        load_pretrained(path)
    loaded = load_pretrained(path, preset="demo")
    assert loaded.logit_bias is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("executed",))

    torch.save({"state_dict": Payload()}, tmp_path / "weights.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_pretrained(tmp_path / "weights.pt", preset="demo")


@pytest.mark.parametrize("kind", ["cut", "a tensor", "a number among them", "no safetensors", "nothing"])
def test_what_is_no_state_dict_is_told_in_a_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "no safetensors" else "weights.pt")
    content = {"a tensor": torch.zeros(2), "a number among them": {"a": torch.zeros(2), "b": 3}, "nothing": {}}
    torch.save(content.get(kind, {"a": torch.zeros(999)}), path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"weights\.\w+: (holds no plain tensors|not names with a tensor each)"):
        load_pretrained(path, preset="demo")


@pytest.mark.parametrize(("key", "value"), [("resize_mode", "squash"), ("interpolation", "bilinear")])
def test_pictures_brought_to_size_in_another_way_are_refused(
    folder: tuple[Path, torch.nn.Module], tmp_path: Path, key: str, value: str
) -> None:
    shutil.copytree(folder[0], tmp_path / "other")
    path = tmp_path / "other" / "open_clip_config.json"
    config = json.loads(path.read_bytes())
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), key: value}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"preprocess_cfg\.{key} = '{value}'"):
        load_pretrained(tmp_path / "other")


def test_another_activation_of_transformers_is_refused() -> None:
    sections: dict[str, dict[str, object]] = {"text_config": {}, "vision_config": {}}
    assert preset_from_hf(sections).quick_gelu
    for text, vision in (("relu", "relu"), ("gelu", "quick_gelu")):
        sections = {"text_config": {"hidden_act": text}, "vision_config": {"hidden_act": vision}}
        with pytest.raises(ConfigError, match=rf"hidden_act = '{text} and {vision}'"):
            preset_from_hf(sections)


def test_other_norms_of_transformers_are_refused() -> None:
    sections: dict[str, dict[str, object]] = {"text_config": {}, "vision_config": {"layer_norm_eps": 1e-2}}
    with pytest.raises(ConfigError, match=r"vision_config.layer_norm_eps = 0.01"):
        preset_from_hf(sections)


def test_pictures_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}, "vision_config": {}}))
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 3, "size": 224}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    found = read_preset(tmp_path)
    assert found is not None
    assert (found.image_mean, found.image_std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for key, value in (("resample", 2), ("do_center_crop", False), ("size", {"height": 224, "width": 224})):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, key: value}))
        with pytest.raises(ConfigError, match=rf"preprocessor_config.{key} = .*Use a model that was trained so"):
            read_preset(tmp_path)
    edges: list[tuple[str, object]] = [("size", 256), ("size", {"shortest_edge": 256}), ("rescale_factor", 1 / 127.5)]
    for key, value in [*edges, ("crop_size", {"height": 192, "width": 192})]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, key: value}))
        with pytest.raises(ConfigError, match=rf"preprocessor_config.{key} = .*Use a model that was trained so"):
            read_preset(tmp_path)


SPOILED: dict[str, Any] = {
    "cut": '{"model_cfg": {"emb', "nested": "[" * 100_000, "no object": [],
    "no vision": {"model_cfg": {"text_cfg": {}}},
    "no heads": {"model_cfg": MODEL_CFG | {"vision_cfg": {"width": 64, "head_width": 65}}},
    "no number": {"model_cfg": MODEL_CFG | {"embed_dim": "48"}},
    "one channel": CONFIG | {"preprocess_cfg": {"mean": [0.5]}},
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_configuration_is_told_with_its_file(
    folder: tuple[Path, torch.nn.Module], tmp_path: Path, kind: str
) -> None:
    content = SPOILED[kind]
    path = folder[0] / "open_clip_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"open_clip_config\.json: not the configuration of a CLIP model"):
        load_pretrained(folder[0])
    (folder[0] / "open_clip_model.safetensors").unlink()
    (tmp_path / "config.json").write_text(path.read_text())
    torch.save({HF_NAME: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"tmp.*[^_]config\.json: not the configuration of a CLIP model"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(1, dtype=torch.int8), torch.zeros(1).to_sparse()])
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({0: torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not names with a tensor each"):
        load_pretrained(tmp_path / "weights.pt", preset="demo")
    torch.save({"logit_scale": tensor}, tmp_path / "weights.pt")
    problem = r"logit_scale \[3\] instead of \[1\]" if len(tensor) == 3 else "logit_scale is .*not quantised ones"
    with pytest.raises(ValueError, match=problem):
        load_pretrained(tmp_path / "weights.pt", preset="demo")


def test_a_preset_that_the_json_contradicts_is_refused(folder: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(ConfigError, match=r"preset = 'demo'.*quick_gelu: True there, False here.*image_mean"):
        load_pretrained(folder[0], preset="demo")


def test_no_weights_names_the_files_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"open_clip_model.safetensors"):
        load_pretrained(tmp_path)


def test_a_misfit_lists_every_kind_of_difference_and_changes_nothing() -> None:
    model = create_model(PRESETS["demo"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_dict = {name: torch.zeros_like(tensor) for name, tensor in to_open_clip_state_dict(model).items()}
    del state_dict["visual.proj"]
    state_dict["text.extra"] = torch.zeros(1)
    state_dict["ln_final.weight"] = torch.zeros(7)
    with pytest.raises(
        ValueError, match=r"1 missing: visual.proj\..*1 unexpected: text.extra\..*ln_final.weight \[7\]"
    ):
        load_open_clip_state_dict(model, state_dict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_extras_of_openai_archives_are_ignored() -> None:
    model = create_model(PRESETS["demo"])
    extras = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(16),
        "vocab_size": torch.tensor(49408),
    }
    load_open_clip_state_dict(model, {**to_open_clip_state_dict(model), **extras})


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"demo", "toy"}))
def test_presets_equal_open_clips_model_configs(open_clip: ModuleType, name: str) -> None:
    assert preset_from_open_clip(open_clip.get_model_config(name)) == PRESETS[name]


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "ViT-B-16-SigLIP", "roberta-ViT-B-32", "convnext_base"])
def test_architectures_that_are_not_plain_clip_are_refused(open_clip: ModuleType, name: str) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        preset_from_open_clip(open_clip.get_model_config(name))


def test_settings_spelled_out_at_open_clips_defaults_are_a_plain_model(open_clip: ModuleType) -> None:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    plain = open_clip.get_model_config("ViT-B-32")
    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    spelled = {name: dataclasses.asdict(kind(**plain[name])) for name, kind in towers.items()}
    config = {**plain, **spelled, "custom_text": False, "nonscalar_logit_scale": False}
    assert preset_from_open_clip(config) == PRESETS["ViT-B-32"]
    for name, key, value in (("vision_cfg", "mlp_ratio", 4.9231), ("text_cfg", "pool_type", "eos")):
        with pytest.raises(ConfigError, match=rf"{name}\.{key}"):
            preset_from_open_clip({**config, name: {**spelled[name], key: value}})


def test_a_torchscript_archive_is_named_with_where_else_its_weights_are(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt.*TorchScript.*not run here.*safetensors"):
        read_state_dict(path)
