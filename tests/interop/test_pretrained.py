"""Runs that start from the weights of open_clip and of transformers: both towers, or one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import export, make_run

from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.models.building import build_model
from neuclip_scale.models.clip import CLIP


def start(folder: Path, **overrides: Any) -> CLIP:
    torch.manual_seed(5)
    return build_model(load_recipe("demo", {"model.pretrained": str(folder), **overrides}))


@pytest.fixture(scope="module", params=["open_clip", "hf"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIP, Path]:
    folder = tmp_path_factory.mktemp("trained")
    model, _ = make_run(folder / "run")
    return model, export(folder / "run", request.param, folder / "out")


def test_both_towers_and_the_temperature(trained: tuple[CLIP, Path]) -> None:
    model, folder = trained
    started = start(folder).state_dict()
    assert all(torch.equal(value, started[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower(trained: tuple[CLIP, Path], tower: str) -> None:
    model, folder = trained
    started = start(folder, **{"model.pretrained_towers": tower}).state_dict()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, started[name])}
    assert same == {
        name for name in started if name != "logit_scale" and name.startswith("visual.") == (tower == "image")
    }


def test_another_resolution_resamples_the_positions(trained: tuple[CLIP, Path]) -> None:
    model, folder = trained
    started = start(folder, **{"model.image_size": 64}).state_dict()["visual.positional_embedding"]
    old = model.state_dict()["visual.positional_embedding"]
    assert started.shape == (65, 160)
    assert torch.equal(started[0], old[0]), "the class token has no place"
    grid = started[1:].view(8, 8, 160)
    # Bicubic with half-pixel centres: the mean of four new ones stays near the old one between them.
    torch.testing.assert_close(grid.view(4, 2, 4, 2, 160).mean((1, 3)).mean((0, 1)), old[1:].mean(0), rtol=0, atol=2e-2)


def test_another_architecture_says_what_differs(trained: tuple[CLIP, Path], tmp_path: Path) -> None:
    _, folder = trained
    with pytest.raises(ConfigError, match=r"another architecture.*image: .*text: "):
        start(folder, **{"model.preset": "toy"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.pretrained = .*neither a weights file nor"):
        start(tmp_path / "empty")


def test_heads_and_activation_do_not_show_in_shapes_and_are_checked(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    folder = export(tmp_path / "run", "open_clip", tmp_path / "out")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_bytes())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quick_gelu: True there, False here"):
        start(folder)
    config["model_cfg"] |= {"quick_gelu": False, "vision_cfg": config["model_cfg"]["vision_cfg"] | {"head_width": 80}}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"heads=2.*heads=5"):
        start(folder)
    with pytest.raises(ConfigError, match=r"heads=2.*heads=5"):
        start(folder, **{"model.pretrained_towers": "image"})
    start(folder, **{"model.pretrained_towers": "text"})


def test_pictures_normalised_otherwise_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    folder = export(tmp_path / "run", "open_clip", tmp_path / "out")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_bytes())
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), "mean": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"image_mean: \(0\.5, 0\.5, 0\.5\) there"):
        start(folder)
    start(folder, **{"model.pretrained_towers": "text"})


def test_a_bare_weights_file(tmp_path: Path) -> None:
    model, _ = make_run(tmp_path / "run")
    folder = export(tmp_path / "run", "open_clip", tmp_path / "out")
    weights = (folder / "open_clip_model.safetensors").rename(tmp_path / "weights.safetensors")
    assert torch.equal(start(weights).state_dict()["visual.proj"], model.state_dict()["visual.proj"])
    with pytest.raises(ConfigError, match=r"do not fit the model.*of another shape"):
        start(weights, **{"model.preset": "toy"})
    for rows in (torch.zeros(19, 160), torch.zeros(160), torch.zeros(())):  # 18 patches make no square
        torch.save(model.state_dict() | {"visual.positional_embedding": rows}, tmp_path / "weights.pt")
        with pytest.raises(ConfigError, match=r"of another shape: visual\.positional_embedding \["):
            start(tmp_path / "weights.pt")
