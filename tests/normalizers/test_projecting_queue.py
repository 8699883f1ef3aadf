"""A queue whose entries are mapped anew: where only the last maps move, no entry is old."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neuclip_scale.config import ConfigError
from neuclip_scale.losses import create_loss
from neuclip_scale.models.building import create_model
from neuclip_scale.models.clip import CLIP, joined_projections
from neuclip_scale.models.presets import PRESETS
from neuclip_scale.normalizers import EmbeddingQueue, ProjectingQueue
from neuclip_scale.projection import Projection
from neuclip_scale.similarity import PairFeatures

TINY = replace(
    PRESETS["demo"],
    embed_dim=12,
    image=replace(PRESETS["demo"].image, patch_size=16, width=32, layers=1, heads=2),
    text=replace(PRESETS["demo"].text, width=16, layers=1, heads=2),
)
B, SIZE, STEPS = 7, 19, 5
HORIZONS = torch.tensor([7.0, 14.0, torch.inf])


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    model = create_model(TINY).eval()
    model.show_projections()
    return model


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B * STEPS, 3, 32, 32), torch.randint(1, 49000, (B * STEPS, 16))


@torch.no_grad()
def encode(model: CLIP, images: Tensor, tokens: Tensor) -> PairFeatures:
    output = model(images, tokens)
    return replace(PairFeatures.single(*output.both()), projections=joined_projections([output]))


@torch.no_grad()
def steps(model: CLIP, data: tuple[Tensor, Tensor]) -> Iterator[tuple[int, PairFeatures]]:
    """Batches, and after each another last map of either tower."""
    for step, (images, tokens) in enumerate(zip(data[0].split(B), data[1].split(B), strict=True)):
        yield step, encode(model, images, tokens)
        for matrix in (model.visual.proj, model.text_projection):
            matrix += 0.2 * matrix.std() * torch.randn_like(matrix)


def test_sums_are_over_what_the_maps_make_of_past_pairs_now(model: CLIP, data: tuple[Tensor, Tensor]) -> None:
    """Over the length that they had, in fp64; a queue that keeps embeddings is far from it."""
    queue, kept = ProjectingQueue(model.projected_widths, SIZE), EmbeddingQueue(12, SIZE)
    lengths: list[Tensor] = []  # of each batch's features, [B, 2], by the maps of its step
    for step, pairs in steps(model, data):
        index = torch.arange(step * B, (step + 1) * B)
        assert pairs.projections is not None
        made = [each.inputs.double() @ each.matrix.double() for each in pairs.projections]
        lengths.append(torch.stack([each.norm(dim=1) for each in made], 1))
        if step:
            now = features(model, data, step * B, torch.cat(lengths[:step]))
            found = queue.sums(pairs, torch.tensor([9.0]), index, HORIZONS, tile_size=4)
            torch.testing.assert_close(found.log_sums, dense_sums(pairs, *now), rtol=1e-4, atol=1e-4)
            old = kept.sums(pairs, torch.tensor([9.0]), index, HORIZONS, tile_size=4)
            assert (old.log_sums - dense_sums(pairs, *now)).abs().max() > 0.01
        for each in (queue, kept):
            each.push(pairs, index)


@torch.no_grad()
def features(model: CLIP, data: tuple[Tensor, Tensor], count: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What the model makes of the first pairs now, divided by `lengths` [count, 2] -> image, text [count, d]."""
    projections = encode(model, data[0][:count], data[1][:count]).projections
    assert projections is not None
    image, text = (each.inputs.double() @ each.matrix.double() for each in projections)
    return image / lengths[:, :1], text / lengths[:, 1:]


def dense_sums(pairs: PairFeatures, image: Tensor, text: Tensor) -> Tensor:
    """log sum_q exp(-age/h) exp(9 (x_i . q - s_ii)) over the last pairs -> [B, 2, H]."""
    ages = torch.arange(len(image) - 1, -1, -1)[-SIZE:].double()
    weights = torch.exp(-ages[:, None] / HORIZONS)
    positives = (pairs.image.double() * pairs.text.double()).sum(1, keepdim=True)
    sides = [
        torch.exp(9 * (anchors.double() @ negatives[-SIZE:].T - positives)) @ weights
        for anchors, negatives in ((pairs.image, text), (pairs.text, image))
    ]
    return torch.stack(sides, 1).log().float()


def test_where_no_map_moves_it_is_the_queue_of_embeddings(model: CLIP, data: tuple[Tensor, Tensor]) -> None:
    queues = ProjectingQueue(model.projected_widths, SIZE), EmbeddingQueue(12, SIZE)
    for step in range(STEPS):
        rows = slice(step * B, (step + 1) * B)
        pairs, index = encode(model, data[0][rows], data[1][rows]), torch.arange(rows.start, rows.stop)
        anew, kept = (each.sums(pairs, torch.tensor([9.0]), index, HORIZONS, tile_size=4) for each in queues)
        torch.testing.assert_close(anew.log_sums, kept.log_sums, rtol=1e-4, atol=1e-4)
        for each in queues:
            each.push(pairs, index)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_linear_layer_in_bf16_shows_its_own_weights(bias: float) -> None:
    """By what it does alone, to bf16's rounding of the weights, however large the bias, as of RN50's last map."""
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(256, 64), torch.randn(32, 256)
    torch.nn.init.uniform_(layer.bias, -bias, bias)
    with torch.autocast("cpu", torch.bfloat16):
        shown = Projection.of_linear(inputs, layer)
    assert torch.equal(shown.inputs, torch.cat([inputs, torch.ones(32, 1)], 1))
    matrix, offset = shown.matrix.float().split([256, 1])
    torch.testing.assert_close(matrix, layer.weight.T, rtol=0.008, atol=2e-4)
    torch.testing.assert_close(offset[0], layer.bias, rtol=0.004, atol=1e-6)


def test_a_linear_layer_without_bias_shows_its_weights() -> None:
    layer, inputs = torch.nn.Linear(256, 64, bias=False), torch.randn(32, 256)
    shown = Projection.of_linear(inputs, layer)
    assert torch.equal(shown.inputs, inputs)
    assert torch.equal(shown.matrix, layer.weight.T)


def test_ranks_together_hold_one_queue(model: CLIP, data: tuple[Tensor, Tensor]) -> None:
    """Each its slots, of which a run of another number of ranks makes the same queue."""
    whole = ProjectingQueue(model.projected_widths, SIZE)
    ranks = [ProjectingQueue(model.projected_widths, SIZE, rank=rank, world_size=3) for rank in range(3)]
    for step, pairs in steps(model, data):
        for queue in (whole, *ranks):
            queue.push(pairs, torch.arange(step * B, (step + 1) * B))
    loaded = ProjectingQueue(model.projected_widths, SIZE)
    loaded.load_state_dict(whole.state_dict())
    loaded.load_rank_states([queue.rank_state() for queue in ranks])
    for rank, queue in enumerate(ranks):
        for name, slots in queue.rank_state().items():
            assert torch.equal(loaded.rank_state()[name][rank::3], slots)
    # Products of ranks' few rows round in another way.
    torch.testing.assert_close(loaded.image, whole.image)
    torch.testing.assert_close(loaded.text, whole.text)
    assert torch.equal(loaded.index, whole.index)


def test_a_checkpoint_of_the_other_kind_of_queue_is_refused(model: CLIP) -> None:
    plain = EmbeddingQueue(12, SIZE)
    queue = ProjectingQueue(model.projected_widths, SIZE)
    with pytest.raises(ValueError, match=r"no queue_image_preimages: set objective\.queue\.project_anew as"):
        queue.load_rank_states([plain.rank_state()])
    with pytest.raises(ValueError, match="no queue_image: set"):
        plain.load_rank_states([queue.rank_state()])


def test_where_the_last_maps_are_not_seen_it_says_so(model: CLIP, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.queue\.project_anew = True: a loss by itself"):
        create_loss("neuclip-queue", embed_dim=12, size=SIZE, project_anew=True)
    model.show_projections(False)
    pairs = encode(model, data[0][:B], data[1][:B])
    with pytest.raises(ValueError, match=r"pairs\.projections = None.*show_projections"):
        ProjectingQueue(model.projected_widths, SIZE).push(pairs, torch.arange(B))
