"""FLOPs of the encoders against formulas written from the architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neuclip_scale.config import load_recipe
from neuclip_scale.models.building import build_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.telemetry import flops
from neuclip_scale.telemetry.flops import CaptionTokens, EncoderFlops, count_encoder_flops, every_token_flops


def model(preset: str, **fields: object) -> CLIP:
    torch.manual_seed(0)
    return build_model(load_recipe("demo", {"model.preset": preset, **fields}))


def blocks(length: int, width: int, layers: int) -> int:
    """Forward FLOPs of a transformer: 12 width^2 weights per token and layer, and the two products of attention."""
    return layers * (2 * 12 * width**2 * length + 2 * 2 * length**2 * width)


def unasked(length: int, width: int) -> int:
    """What a last block does not compute for the tokens that nobody asks for: query, attention, output, perceptron."""
    return (length - 1) * (2 * 10 * width**2 + 2 * 2 * length * width)


def vit_b_32() -> tuple[int, int]:
    """Forward FLOPs of ViT-B-32's image tower at 224 pixels, and of its text tower at 77 tokens."""
    patches = (224 // 32) ** 2
    image = 2 * patches * (3 * 32 * 32) * 768 + blocks(patches + 1, 768, 12) + 2 * 768 * 512
    return image, blocks(77, 512, 12) + 2 * 512 * 512


def test_vit_b_32_is_the_formula_and_the_published_figure() -> None:
    image, text = vit_b_32()
    # docs/model_profile.csv of open_clip
    assert image / 1e9 == pytest.approx(8.82, abs=0.005)
    assert text / 1e9 == pytest.approx(5.96, abs=0.005)
    counted = count_encoder_flops(model("ViT-B-32"))
    assert counted.forward == image + text - unasked(50, 768) - unasked(77, 512)
    # Backward, every product is done twice; but nothing needs the gradient of the pictures.
    patch_convolution = 2 * 49 * (3 * 32 * 32) * 768
    assert counted.training == 3 * counted.forward - patch_convolution
    assert counted.recomputed == 0
    assert every_token_flops(model("ViT-B-32")) == 3 * (image + text)


def test_a_locked_tower_has_no_backward_pass() -> None:
    image, text = vit_b_32()
    locked, some = (model("ViT-B-32", **{"model.lock": "image", "model.unlocked_layers": layers}) for layers in (0, 2))
    counted, trained = count_encoder_flops(locked), count_encoder_flops(model("ViT-B-32"))
    assert counted.forward == trained.forward
    assert counted.training == counted.image_forward + 3 * counted.text_forward
    assert counted.training < count_encoder_flops(some).training < trained.training
    assert every_token_flops(locked) == image + 3 * text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shorter_captions_are_counted_as_if_the_context_were_theirs(checkpointing: bool) -> None:
    whole = model("ViT-B-32", **{"model.text_layers": 3, "model.grad_checkpointing": checkpointing})
    counted, lengths = count_encoder_flops(whole), (20, 33)
    expected = []
    for length in lengths:
        whole.context_length = length
        expected.append(count_encoder_flops(whole))
        assert counted.at(CaptionTokens(length, length**2)) == replace(
            expected[-1], context_length=77, text=counted.text
        )
    both = counted.at(CaptionTokens(sum(lengths) / 2, sum(length**2 for length in lengths) / 2))
    assert 2 * both.training == pytest.approx(sum(each.training for each in expected), abs=1)
    assert counted.at(CaptionTokens(77, 77**2)) == counted


@pytest.mark.parametrize(
    "fields",
    [
        {"model.grad_checkpointing": True, "model.dropout": 0.1},
        {"model.lock": "image"},
        {"model.lock": "image", "model.unlocked_layers": 2},
    ],
)
def test_blocks_that_are_alike_need_not_all_be_run(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    deep = model("demo", **{"model.image_layers": 9, "model.text_layers": 7, **fields})
    by_three = count_encoder_flops(deep)
    monkeypatch.setattr(flops, "_alike", lambda blocks: False)
    assert count_encoder_flops(deep) == by_three


def test_what_a_step_runs() -> None:
    counted = EncoderFlops(image_forward=10, text_forward=3, training=39, recomputed=7)
    assert counted.forward == 13
    assert counted.executed(8, again=(0, 0)) == 8 * 46
    assert counted.executed(8, again=(6, 4)) == 8 * 46 + 6 * 10 + 4 * 3


def test_grad_checkpointing_runs_the_blocks_once_more() -> None:
    plain = count_encoder_flops(model("demo"))
    again = count_encoder_flops(model("demo", **{"model.grad_checkpointing": True}))
    assert (again.forward, again.training) == (plain.forward, plain.training)
    # Torch stops a recomputation at the last tensor that the backward pass needs: the input of a block's last product.
    towers = (17, 160, 4), (16, 128, 2)
    skipped = sum(2 * 4 * width**2 * (length * (layers - 1) + 1) for length, width, layers in towers)
    whole = sum(blocks(*tower) - unasked(*tower[:2]) for tower in towers)
    assert again.recomputed == whole - skipped


@pytest.mark.parametrize("fields", [{}, {"model.dropout": 0.1, "model.grad_checkpointing": True}])
def test_counting_leaves_the_model_and_the_generators_alone(fields: dict[str, object]) -> None:
    counted = model("demo", **fields).train()
    before = {name: value.clone() for name, value in counted.state_dict().items()}
    random = torch.get_rng_state()
    found = count_encoder_flops(counted)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in counted.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in counted.parameters())
    assert count_encoder_flops(counted) == found
    assert every_token_flops(counted) == every_token_flops(model("demo")) > found.training
    assert count_encoder_flops(counted) == found


def test_batch_norm_and_its_statistics() -> None:
    counted = model("RN50")
    before = {name: value.clone() for name, value in counted.named_buffers()}
    found = count_encoder_flops(counted)
    # open_clip's attention pooling has all 50 places as queries and keeps the first; here it is asked for alone.
    of_pooling = 49 * (2 * (2048 * 2048 + 2048 * 1024) + 2 * 2 * 50 * 2048)
    assert (found.image_forward + of_pooling) / 1e9 == pytest.approx(12.22, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in counted.named_buffers())


class LooksAtValues(torch.nn.Module):
    """A tower that cannot run on the meta device."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tower(images)
        return features if float(images.sum()) == 0 else -features


def test_a_tower_that_looks_at_values_is_counted_from_a_real_batch() -> None:
    plain, watched = model("demo"), model("demo")
    watched.visual = LooksAtValues(watched.visual)  # type: ignore[assignment]
    random = torch.get_rng_state()
    assert count_encoder_flops(watched) == count_encoder_flops(plain)
    assert torch.equal(torch.get_rng_state(), random)
