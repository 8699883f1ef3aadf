"""A gradient-cached step against the whole batch in one graph, with dropout on and uneven micro-batches."""

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuclip_scale.config import NPNConfig, ObjectiveConfig
from neuclip_scale.data.batch import Batch, caption_lengths
from neuclip_scale.engines.base import inputs
from neuclip_scale.grad_cache import CachedFeatures, KeptActivations
from neuclip_scale.models.building import create_model
from neuclip_scale.models.clip import CLIP, CLIPOutput, Towers
from neuclip_scale.models.presets import get_preset
from neuclip_scale.objectives import create_objective
from neuclip_scale.objectives.registry import Problem
from neuclip_scale.similarity import PairFeatures

B = 11


def alone(*, is_last: bool) -> nullcontext[None]:
    """One process: nothing to communicate."""
    return nullcontext()


def make_model(dropout: float) -> CLIP:
    torch.manual_seed(0)
    return create_model(get_preset("demo"), dropout=dropout).train()


def make_batch(model: CLIP) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, model.image_size, model.image_size, generator=generator)
    tokens = torch.randint(1, 40000, (B, model.context_length), generator=generator)
    lengths = torch.randint(2, model.context_length + 1, (B,), generator=generator)
    tokens[torch.arange(model.context_length) >= lengths[:, None]] = 0
    tokens[torch.arange(B), lengths - 1] = 49407
    uids = tuple(map(str, range(B)))
    return Batch(images, tokens, torch.arange(B), uids, text_lengths=caption_lengths(tokens))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model: CLIP, batch: Batch, micro: int) -> list[Batch]:
    return [part.packed(model) for part in batch.split(micro)]


def reference_gradients(model: CLIP, batch: Batch, micro: int) -> dict[str, Tensor]:
    """Everything in one graph: micro-batches are encoded in order, so that dropout draws the same numbers."""
    torch.manual_seed(5)
    parts = [model(*inputs(part, "both")) for part in packed(model, batch, micro)]
    image, text = torch.cat([p.image_features for p in parts]), torch.cat([p.text_features for p in parts])
    logits = parts[0].logit_scale * image @ text.T
    labels = torch.arange(B)
    loss = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return gradients(model)


def cached_gradients(
    model: CLIP, batch: Batch, micro: int, keep: KeptActivations
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Gradients of a cached step, and how many rows each tower has encoded."""
    rows_of = {"image": 0, "text": 0}

    def encode(part: Batch, towers: Towers = "both") -> CLIPOutput:
        for tower in rows_of:
            rows_of[tower] += len(part) if towers in ("both", tower) else 0
        return model(*inputs(part, towers))

    torch.manual_seed(5)
    cached = CachedFeatures(encode, model, packed(model, batch, micro), alone, keep)
    objective = create_objective(ObjectiveConfig(name="openclip", tile_size=4), Problem(embed_dim=model.embed_dim))
    output = objective(PairFeatures.single(cached.image, cached.text), cached.logit_scale)
    after_encoding = torch.get_rng_state()
    for rows, encoded in cached.replay():
        total = (encoded.image_features * output.image_gradient[rows]).sum()
        total = total + (encoded.text_features * output.text_gradient[rows]).sum()
        if rows.stop == B:
            total = total + (encoded.logit_scale * output.logit_scale_gradient).sum()
        total.backward()
    assert torch.equal(torch.get_rng_state(), after_encoding), "the replay must not advance the generator"
    return gradients(model), rows_of


@pytest.mark.parametrize("micro", [3, 4, B])
def test_cached_step_equals_the_whole_batch_with_dropout(micro: int) -> None:
    model = make_model(dropout=0.2)
    batch = make_batch(model)
    expected = reference_gradients(model, batch, micro)
    model.zero_grad()
    actual, rows = cached_gradients(model, batch, micro, KeptActivations())
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(actual[name], expected[name], rtol=2e-4, atol=2e-6), name
    assert rows == dict.fromkeys(rows, B if micro == B else 2 * B), "one micro-batch: no second pass"


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("tower", ["", "image", "text"])
def test_kept_activations_change_no_gradient(kept: int, tower: Any) -> None:
    """To the bit, with dropout on and a smaller last micro-batch; and what was kept is not encoded again."""
    model = make_model(dropout=0.2)
    batch = make_batch(model)
    expected, _ = cached_gradients(model, batch, 3, KeptActivations())
    model.zero_grad()
    actual, rows = cached_gradients(model, batch, 3, KeptActivations(kept, tower))
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    again = B - 3 * kept
    assert rows == {name: B if name == tower else B + again for name in ("image", "text")}


def test_without_rng_replay_the_gradients_would_differ() -> None:
    """The test above can fail: other dropout masks give clearly other gradients."""
    model = make_model(dropout=0.2)
    batch = make_batch(model)
    first = reference_gradients(model, batch, 4)
    model.zero_grad()
    torch.manual_seed(6)
    parts = [model(part.images, part.tokens) for part in batch.split(4)]
    image, text = torch.cat([p.image_features for p in parts]), torch.cat([p.text_features for p in parts])
    logits = parts[0].logit_scale * image @ text.T
    nn.functional.cross_entropy(logits, torch.arange(B)).backward()
    other = gradients(model)
    assert max((other[name] - first[name]).abs().max() for name in first) > 1e-3


@pytest.mark.parametrize("keep", [KeptActivations(), KeptActivations(1), KeptActivations(1, "text"),
                                  KeptActivations(1, "image")])  # fmt: skip
def test_batch_norm_counts_a_batch_once(keep: KeptActivations) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, images: Tensor | None, tokens: Tensor | None, packing: None = None) -> CLIPOutput:
            return CLIPOutput(None if images is None else self.norm(images), tokens, torch.ones(1), None)

    torch.manual_seed(0)
    images = torch.randn(12, 6)
    batch = Batch(images, torch.randn(12, 6), torch.arange(12), tuple("abcdefghijkl"))
    model, plain = Normalised(), Normalised()

    def encode(part: Batch, towers: Towers = "both") -> CLIPOutput:
        return model(*inputs(part, towers))

    for _, output in CachedFeatures(encode, model, batch.split(4), alone, keep).replay():
        output.image_features.sum().backward()  # nothing that a kept graph needs was written to
    for part in batch.split(4):
        plain(part.images, part.tokens)
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert torch.equal(model.norm.running_var, plain.norm.running_var)
    assert model.norm.num_batches_tracked == plain.norm.num_batches_tracked == 3


def test_objective_config_reaches_the_npn() -> None:
    section = ObjectiveConfig(name="neuclip", npn=NPNConfig(num_prototypes=9))
    assert create_objective(section, Problem(embed_dim=4)).image_npn.num_prototypes == 9


@pytest.mark.parametrize("keep", [KeptActivations(), KeptActivations(2), KeptActivations(1, "text")])
def test_one_copy_of_the_last_maps_is_held(keep: KeptActivations) -> None:
    """However many micro-batches there are, and with the inputs of all."""
    model = make_model(dropout=0.0)
    model.show_projections()
    batch, maps = make_batch(model), list[weakref.ref[Tensor]]()

    def encode(part: Batch, towers: Towers = "both") -> CLIPOutput:
        output = model(*inputs(part, towers))
        shown = (output.image_projection, output.text_projection)
        maps.extend(weakref.ref(each.matrix) for each in shown if each is not None)
        return output

    cached = CachedFeatures(encode, model, packed(model, batch, 3), alone, keep)
    assert len(maps) == 2 * len(cached.micro_batches) > 2
    assert sum(each() is not None for each in maps) == 2
    assert cached.pairs.projections is not None
    for features, (given, matrix) in zip((cached.image, cached.text), cached.pairs.projections, strict=True):
        torch.testing.assert_close(nn.functional.normalize(given @ matrix, dim=-1), features.detach())
