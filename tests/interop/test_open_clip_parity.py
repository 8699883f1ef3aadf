"""Our models and open_clip's of the same name: same parameters, same initial spread, same features."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from neuclip_scale.config import ModelConfig, Recipe
from neuclip_scale.models.building import create_model, plan_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.interop import load_open_clip_state_dict, to_open_clip_state_dict
from neuclip_scale.models.presets import PRESETS

RUN = ["ViT-B-32", "ViT-B-16-quickgelu", "RN50", "RN50-quickgelu"]
OPEN_CLIP_NAMES = sorted(set(PRESETS) - {"demo", "toy"})


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def _open_clip_model(open_clip: ModuleType, name: str) -> nn.Module:
    torch.manual_seed(1)
    return open_clip.create_model(name, pretrained=None).eval()


def _batch(model: CLIP) -> tuple[Tensor, Tensor]:
    images = _images(model.image_size)
    tokens = torch.randint(1, 49000, (3, model.context_length))
    for row, end in enumerate((2, 40, 76)):  # the end token early, inside, last
        tokens[row, end], tokens[row, end + 1 :] = 49407, 0
    return images, tokens


def _images(size: int) -> Tensor:
    """Three pictures of coarse squares: independent pixels average out and all look alike to a ResNet."""
    torch.manual_seed(2)
    return torch.nn.functional.interpolate(torch.randn(3, 3, 5, 5), size=(size, size))


def _assert_same_features(ours: CLIP, theirs: nn.Module) -> None:
    images, tokens = _batch(ours)
    with torch.no_grad():
        output = ours(images, tokens)
        for features in (output.image_features, output.text_features):
            assert (features @ features.T - torch.eye(3)).max() < 0.99, "the inputs look alike: nothing is tested"
        image_features, text_features = theirs.encode_image(images, True), theirs.encode_text(tokens, True)
        torch.testing.assert_close(output.image_features, image_features, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.text_features, text_features, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.logit_scale, theirs.logit_scale.exp().reshape(1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name.startswith("ViT-H") else ()) for name in OPEN_CLIP_NAMES]
)
def test_names_and_shapes_equal_open_clips(open_clip: ModuleType, name: str) -> None:
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(name))
    ours = plan_model(Recipe(model=ModelConfig(preset=name)))
    assert _shapes(to_open_clip_state_dict(ours)) == _shapes(theirs.state_dict())
    assert ours.logit_scale.shape == (1,)


@pytest.mark.parametrize("name", RUN)
def test_features_equal_with_open_clips_weights(open_clip: ModuleType, name: str) -> None:
    theirs, ours = _open_clip_model(open_clip, name), create_model(PRESETS[name]).eval()
    if name.startswith("RN50"):
        _settle_batch_norm(theirs.visual)
    load_open_clip_state_dict(ours, theirs.state_dict())
    _assert_same_features(ours, theirs)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_features_equal_with_our_weights_in_open_clip(open_clip: ModuleType, name: str) -> None:
    theirs, ours = _open_clip_model(open_clip, name), create_model(PRESETS[name]).eval()
    if name == "RN50":
        _settle_batch_norm(ours.visual)
    theirs.load_state_dict(to_open_clip_state_dict(ours), strict=True)
    _assert_same_features(ours, theirs)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_initial_values_are_spread_as_open_clips(open_clip: ModuleType, name: str) -> None:
    theirs = _open_clip_model(open_clip, name).state_dict()
    ours = to_open_clip_state_dict(create_model(PRESETS[name]))
    for key, tensor in ours.items():
        if tensor.numel() < 2 or not tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[key])
            continue
        # Standard error of a standard deviation over n normal values is std / sqrt(2n); six of them.
        tolerance = 6 / (2 * tensor.numel()) ** 0.5
        spread = float(theirs[key].std())
        assert abs(float(tensor.std()) - spread) <= 2 * tolerance * spread + 1e-9, key
        assert abs(float(tensor.mean() - theirs[key].mean())) <= 12 * spread / tensor.numel() ** 0.5 + 1e-9, key


def test_timm_tower_equals_open_clips(open_clip: ModuleType) -> None:
    # timm's smallest test model, through open_clip's own adapter.
    name = "test_vit"
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    text = {"width": 512, "heads": 8, "layers": 12}
    theirs = open_clip.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text)
    ours = create_model(PRESETS["ViT-B-32"], image_tower=name, image_size=160).eval()
    load_open_clip_state_dict(ours, theirs.state_dict())
    _assert_same_features(ours, theirs.eval())


def _settle_batch_norm(visual: nn.Module) -> None:
    """Random gains and running statistics of real activations.

    A fresh ResNet has zero gains at the end of every block, which would hide errors inside the blocks.
    """
    torch.manual_seed(3)
    for module in visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    visual.train()
    with torch.no_grad():
        visual(_images(224))
    visual.eval()
