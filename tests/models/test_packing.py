"""Captions without their padding: the packing has the fewest tokens, and features and gradients are those with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from neuclip_scale.data.batch import Batch, caption_lengths, join_batches
from neuclip_scale.evaluation.prompts import encode_texts
from neuclip_scale.models.building import create_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.packing import MOST_RECTANGLES, MULTIPLE, pack
from neuclip_scale.models.presets import get_preset
from neuclip_scale.models.tokenizer import CLIPTokenizer

CPU = torch.device("cpu")
CONTEXT = 77
some_lengths = st.lists(st.integers(2, CONTEXT), min_size=1, max_size=7)
many_lengths = st.lists(st.integers(2, CONTEXT), min_size=1, max_size=30)


def rounded(length: int) -> int:
    return min(-(-length // MULTIPLE) * MULTIPLE, CONTEXT)


def groupings(captions: int) -> Iterator[list[int]]:
    """Every way to cut a sorted list into as many groups as are allowed."""
    for number in range(min(MOST_RECTANGLES, captions)):
        for cuts in itertools.combinations(range(1, captions), number):
            yield [b - a for a, b in itertools.pairwise((0, *cuts, captions))]


@given(some_lengths)
def test_no_other_packing_has_fewer_tokens(lengths: list[int]) -> None:
    ascending = sorted(map(rounded, lengths))
    least = min(
        sum(size * ascending[end - 1] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True))
        for sizes in groupings(len(lengths))
    )
    packing = pack(lengths, CONTEXT, CPU)
    if packing is None:
        assert least == CONTEXT * len(lengths)
        return
    assert sum(captions * length for captions, length in packing.rectangles) == least
    assert len(packing.rectangles) <= MOST_RECTANGLES


@given(many_lengths, st.booleans())
def test_every_caption_finds_its_tokens(lengths: list[int], alike: bool) -> None:
    packing = pack(lengths, CONTEXT, CPU, alike=alike)
    if packing is None:
        return
    tokens = torch.arange(len(lengths) * CONTEXT).view(len(lengths), CONTEXT)
    ids = packing.rows(tokens)
    for caption, length in enumerate(lengths):
        first = packing.starts[packing.inverse[caption]]
        assert ids[first : first + length].tolist() == tokens[caption, :length].tolist()
    assert packing.order[packing.inverse].tolist() == list(range(len(lengths)))
    assert torch.cat([part.flatten() for part in packing.split(ids[:, None])]).equal(ids)
    assert sum(count for count, _ in packing.rectangles) == len(lengths)
    if alike:
        assert min(count for count, _ in packing.rectangles) > 1 or len(lengths) == 1
        assert len(packing.rectangles) == MOST_RECTANGLES or len(lengths) < 4 * MOST_RECTANGLES - 1


def text_model(*, dropout: float = 0.0, checkpointing: bool = False, layers: int = 3) -> CLIP:
    torch.manual_seed(0)
    preset = get_preset("toy")
    preset = replace(preset, image=replace(preset.image, layers=2), text=replace(preset.text, layers=layers))
    model = create_model(preset, dropout=dropout)
    # A context with room for all ten lengths.
    model.positional_embedding = torch.nn.Parameter(torch.randn(CONTEXT, preset.text.width) * 0.1)
    model.context_length = CONTEXT
    model.set_grad_checkpointing(checkpointing)
    return model


def captions(lengths: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, 49407, (length - 1,), generator=generator)
        row[length - 1] = 49407
    return tokens


def gradients(model: CLIP, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    model.zero_grad()
    features = model(None, tokens, model.pack(lengths, CPU) if lengths else None).text_features
    (features * torch.arange(features.numel()).view_as(features).sin()).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[5], [77], [2, 77], [3, 9, 77, 12, 40, 41, 8, 3, 30, 77, 16, 23], [8] * 6, [77] * 5],
    ids=["one", "one full", "extremes", "ragged", "alike", "all full"],
)
def test_features_and_gradients_are_those_of_padded_captions(lengths: list[int], checkpointing: bool) -> None:
    model = text_model(checkpointing=checkpointing).double()
    tokens = captions(lengths)
    assert caption_lengths(tokens) == tuple(lengths)
    assert (model.pack(lengths, CPU) is None) == (set(lengths) == {CONTEXT})
    packed, padded = gradients(model, tokens, lengths), gradients(model, tokens, [])
    assert len(packed) == len(padded) > 10
    for ours, theirs in zip(packed, padded, strict=True):
        # Norms are taken in float32 whatever the model's dtype.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def test_checkpointing_drops_out_the_same_units() -> None:
    lengths = [3, 9, 77, 12, 40, 41, 8, 3]
    found = []
    for checkpointing in (False, True):
        model = text_model(dropout=0.3, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        found.append(gradients(model, captions(lengths), lengths))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_compiled_tower_has_one_program_for_all_lengths() -> None:
    """With a graph and without one, whatever the captions; and it computes what the plain one does."""
    batches = [[3, 9, 77, 12, 40, 41, 8, 3], [4] * 8, [5, 6, 7, 8, 9, 10, 11, 33], [77, 70, 60, 50, 40, 30, 20, 10]]
    plain, compiled = text_model(layers=2), text_model(layers=2)
    compiled.compile_towers(backend="aot_eager")
    torch._dynamo.reset()
    for number, lengths in enumerate(batches):
        tokens = captions(lengths, number)
        for ours, theirs in zip(gradients(compiled, tokens, lengths), gradients(plain, tokens, lengths), strict=True):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            compiled(None, tokens, compiled.pack(lengths, CPU))
        if number == 0:
            programs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == programs


@pytest.mark.long
def test_evaluation_leaves_the_compiler_to_training() -> None:
    """Blocks of both towers share one piece of code, of which training takes eight programs: with and without a graph,
    of all tokens and of one."""
    model, lengths = text_model(layers=2), [3, 9, 77, 12, 40, 41, 8, 3]
    model.compile_towers(by_block=True, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    tokens, images = captions(lengths), torch.randn(8, 3, model.image_size, model.image_size)
    packing = model.pack(lengths, CPU)
    for _ in range(2):
        model.eval()
        with torch.no_grad(), model.compiling_nothing_new():
            for size in (8, 5):
                model(images[:size])
                model(None, tokens[:size], model.pack(lengths[:size], CPU))
        model.train()
        with torch.no_grad():
            model(images, tokens, packing)
        output = model(images, tokens, packing)
        (output.image_features.sum() + output.text_features.sum()).backward()
    assert counters["stats"]["unique_graphs"] == 8
    assert not counters["unimplemented"]


def test_a_batch_knows_its_lengths_through_every_change() -> None:
    tokens = CLIPTokenizer(CONTEXT)(["a cat", "a very long caption of a cat on a mat", "cat"])
    parts = [
        Batch(torch.zeros(len(rows), 3, 4, 4), rows, torch.arange(len(rows)), tuple("ab"[: len(rows)]),
              text_lengths=caption_lengths(rows))
        for rows in (tokens[:2], tokens[2:])
    ]  # fmt: skip
    joined = join_batches(parts).to("cpu")
    assert joined.text_lengths == caption_lengths(tokens) == (4, 12, 3)
    assert [part.text_lengths for part in joined.split(2)] == [(4, 12), (3,)]
    packing = joined.packed(text_model()).packing
    assert packing is not None
    assert packing.rectangles == ((3, 16),) or sum(n for n, _ in packing.rectangles) == 3


def test_only_clips_own_tower_packs() -> None:
    model = text_model()
    assert model.pack((), CPU) is None, "lengths that nobody knows"
    model.packs_captions = False
    assert model.pack((4, 5), CPU) is None


def test_evaluation_encodes_the_same_texts() -> None:
    model, tokenizer, found = text_model().eval(), CLIPTokenizer(CONTEXT), []
    texts = ["cat", "a photo of a very small cat, in the rain", *map(str, range(9)), "x " * 90]
    for model.packs_captions in (True, False):
        found.append(encode_texts(model, tokenizer, texts, CPU, batch_size=5))
    torch.testing.assert_close(*found)
