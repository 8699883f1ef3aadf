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


def test_entries_are_what_the_model_makes_of_past_pairs_now(model: CLIP, data: tuple[Tensor, Tensor]) -> None:
    """The embeddings of all entries, and the sums over them in fp64; a queue that keeps embeddings is far from it."""
    queue, kept = ProjectingQueue(12, SIZE, model.projected_widths), EmbeddingQueue(12, SIZE)
    for step, pairs in steps(model, data):
        index = torch.arange(step * B, (step + 1) * B)
        queue.refresh(pairs)
        now = encode(model, data[0][: step * B], data[1][: step * B]) if step else None
        for slot in range(min(step * B, SIZE)):
            last = max(place for place in range(slot, step * B, SIZE))
            assert now is not None
            torch.testing.assert_close(queue.image[slot], now.image[last], rtol=0, atol=2e-6)
            torch.testing.assert_close(queue.text[slot], now.text[last], rtol=0, atol=2e-6)
        if now is not None:
            found = queue.sums(pairs, torch.tensor([9.0]), index, HORIZONS, tile_size=4)
            torch.testing.assert_close(found.log_sums, dense_sums(pairs, now), rtol=1e-4, atol=1e-4)
            old = kept.sums(pairs, torch.tensor([9.0]), index, HORIZONS, tile_size=4)
            assert (old.log_sums - dense_sums(pairs, now)).abs().max() > 0.01
        for each in (queue, kept):
            each.push(pairs, index)


@pytest.mark.parametrize("between", [2, 3])
def test_entries_take_turns(
    model: CLIP, data: tuple[Tensor, Tensor], between: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry is what the model made of its pair when it came, or 2, 4, ... steps later, whichever was last."""
    monkeypatch.setattr(ProjectingQueue, "STEPS_PER_TURN", 1)
    size = between * B + 3  # no whole number of batches, and the last steps overwrite some
    queue = ProjectingQueue(12, size, model.projected_widths)
    assert queue.steps_between(B) == between
    made: list[PairFeatures] = []  # all pairs by the model of each step
    for step, pairs in steps(model, data):
        made.append(encode(model, *data))
        queue.refresh(pairs)
        expected, slots = dict[int, tuple[Tensor, Tensor]](), range(min(step * B, size))
        for pair in range(step * B):  # younger ones overwrite
            pushed = pair // B
            last = made[pushed + (step - pushed) // between * between]
            expected[pair % size] = last.image[pair], last.text[pair]
        assert sorted(expected) == list(slots)
        for slot, (image, text) in expected.items():
            torch.testing.assert_close(queue.image[slot], image, rtol=0, atol=2e-6)
            torch.testing.assert_close(queue.text[slot], text, rtol=0, atol=2e-6)
        queue.push(pairs, torch.arange(step * B, (step + 1) * B))


def dense_sums(pairs: PairFeatures, now: PairFeatures) -> Tensor:
    """log sum_q exp(-age/h) exp(9 (x_i . q - s_ii)) over the last pairs -> [B, 2, H]."""
    past = len(now.image)
    ages = torch.arange(past - 1, -1, -1)[-SIZE:].double()
    weights = torch.exp(-ages[:, None] / HORIZONS)
    positives = (pairs.image.double() * pairs.text.double()).sum(1, keepdim=True)
    sides = [
        torch.exp(9 * (anchors.double() @ negatives[-SIZE:].double().T - positives)) @ weights
        for anchors, negatives in ((pairs.image, now.text), (pairs.text, now.image))
    ]
    return torch.stack(sides, 1).log().float()


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_linear_layer_in_bf16_shows_its_own_weights(bias: float) -> None:
    """By what it does alone, to bf16's rounding of the weights, however large the bias, as of RN50's last map."""
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(256, 64), torch.randn(32, 256)
    torch.nn.init.uniform_(layer.bias, -bias, bias)
    with torch.autocast("cpu", torch.bfloat16):
        shown = Projection.of_linear(inputs, layer)
    assert shown.offset is not None
    matrix, offset = shown.matrix.float(), shown.offset.float()
    torch.testing.assert_close(matrix, layer.weight.T, rtol=0.008, atol=2e-4)
    torch.testing.assert_close(offset, layer.bias, rtol=0.004, atol=1e-6)


@pytest.mark.parametrize("steps_per_turn", [16, 1])
def test_ranks_together_hold_one_queue(
    model: CLIP, data: tuple[Tensor, Tensor], steps_per_turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its slots, of which a run of another number of ranks makes the same queue; where entries take turns too."""
    monkeypatch.setattr(ProjectingQueue, "STEPS_PER_TURN", steps_per_turn)
    whole = ProjectingQueue(12, SIZE, model.projected_widths)
    ranks = [ProjectingQueue(12, SIZE, model.projected_widths, rank=rank, world_size=3) for rank in range(3)]
    pairs = None
    for step, pairs in steps(model, data):
        for queue in (whole, *ranks):
            queue.refresh(pairs)
            queue.push(pairs, torch.arange(step * B, (step + 1) * B))
    assert pairs is not None
    loaded = ProjectingQueue(12, SIZE, model.projected_widths)
    loaded.load_state_dict(whole.state_dict())
    loaded.load_rank_states([queue.rank_state() for queue in ranks])
    for rank, queue in enumerate(ranks):
        for name, slots in queue.rank_state().items():
            assert torch.equal(loaded.rank_state()[name][rank::3], slots)
    for queue in (whole, loaded, *ranks):
        queue.refresh(pairs)
    for rank, queue in enumerate(ranks):
        torch.testing.assert_close(queue.image, whole.image[rank::3])
        torch.testing.assert_close(queue.text, whole.text[rank::3])
    torch.testing.assert_close(loaded.image, whole.image)
    torch.testing.assert_close(loaded.text, whole.text)
    if queue.steps_between(B) == 1:  # else products of ranks' few rows made some of them, which round in another way
        assert torch.equal(loaded.image, whole.image)
        assert torch.equal(loaded.text, whole.text)
    assert torch.equal(loaded.index, whole.index)


def test_a_checkpoint_of_the_other_kind_of_queue_is_refused(model: CLIP) -> None:
    plain = EmbeddingQueue(12, SIZE)
    queue = ProjectingQueue(12, SIZE, model.projected_widths)
    with pytest.raises(ValueError, match=r"no queue_image_inputs: set objective\.queue\.project_anew as"):
        queue.load_rank_states([plain.rank_state()])
    with pytest.raises(ValueError, match="no queue_image: set"):
        plain.load_rank_states([queue.rank_state()])


def test_where_the_last_maps_are_not_seen_it_says_so(model: CLIP, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.queue\.project_anew = True: a loss by itself"):
        create_loss("neuclip-queue", embed_dim=12, size=SIZE, project_anew=True)
    model.show_projections(False)
    pairs = encode(model, data[0][:B], data[1][:B])
    with pytest.raises(ValueError, match=r"pairs\.projections = None.*show_projections"):
        ProjectingQueue(12, SIZE, model.projected_widths).refresh(pairs)
