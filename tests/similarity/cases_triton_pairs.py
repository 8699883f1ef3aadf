"""The Triton kernels against dense formulas in float64. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton_problems import DEVICE, DTYPES, HALVES, SMALL, assert_close, exact, make_pairs, ramp, scalar

from neuclip_scale.similarity import (
    PairFeatures,
    reference,
    sigmoid,
    tiled,
    triton_blocks,
    triton_chunks,
    triton_sweeps,
)
from neuclip_scale.similarity.chunks import ChunkLimits
from neuclip_scale.similarity.ring import Block
from neuclip_scale.similarity.triton_blocks import Blocks
from neuclip_scale.similarity.triton_chunks import Operands, Sums, chunk_sigmoids, join_chunk

# Whole and as one rank's rows, ragged for every block; d a multiple of the blocks and not.
PROBLEMS = [(41, slice(0, 41), 32), (37, slice(11, 30), 24), (43, slice(40, 43), 19)]
WIDE = [(9, slice(0, 9), 640), (9, slice(2, 7), 768), (7, slice(0, 7), 1280)]


@pytest.mark.parametrize(
    ("world", "local", "dim", "dtype", "exclude_diagonal"),
    [
        *((*problem, dtype, exclude) for problem in PROBLEMS for dtype in DTYPES for exclude in (False, True)),
        *((*problem, torch.bfloat16, True) for problem in WIDE),
    ],
)
def test_one_scale(world: int, local: slice, dim: int, dtype: torch.dtype, exclude_diagonal: bool) -> None:
    pairs, scale = make_pairs(world, local, dim, dtype), scalar(20.0)
    wide = exact(pairs)
    options = {"exclude_diagonal": exclude_diagonal}
    expected = reference.pair_logsumexp(wide, scale.double().cpu(), **options)
    assert_close(triton_sweeps.pair_logsumexp(pairs, scale, limits=SMALL, **options), expected, dtype, "sums")
    shifts = ramp(18, 21, world), ramp(21, 19, world)
    gradients = triton_sweeps.pair_gradients(pairs, scale, *shifts, limits=SMALL, **options)
    expected = reference.pair_gradients(wide, scale.double().cpu(), *(s.double().cpu() for s in shifts), **options)
    assert_close(gradients, expected, dtype, "gradients")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "world"), [(704, 90112), (88, 90112), (512, 65536), (128, 131072)])
def test_few_rows_of_a_large_batch_are_launched(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, world: int, dtype: torch.dtype
) -> None:
    """A rank of hundreds: its chunks are as wide as they are low. Nothing is computed here."""
    launched = []
    monkeypatch.setattr(triton_chunks, "launch", lambda name, *_, **__: launched.append(name))
    rows = torch.zeros(world, 16, dtype=dtype)
    pairs = PairFeatures(rows[:num_rows], rows[:num_rows], rows, rows, world - num_rows)
    scale, shift = torch.ones(1), torch.zeros(world)
    triton_sweeps.pair_gradients(pairs, scale, shift, shift, exclude_diagonal=True)
    triton_sweeps.pair_sigmoids(pairs, scale, torch.zeros(1))
    assert {"exponentials_kernel", "sigmoids_kernel", "product_kernel"} <= set(launched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("world", "local", "dim"), [*PROBLEMS[:2], (21, slice(7, 8), 16)])
def test_a_scale_for_every_row(world: int, local: slice, dim: int, dtype: torch.dtype) -> None:
    pairs, scales = make_pairs(world, local, dim, dtype), ramp(5, 40, 2 * world).view(world, 2)
    wide, wide_scales = exact(pairs), scales.double().cpu()
    s = wide.world_image @ wide.world_text.T
    eye = torch.eye(world, dtype=torch.bool)
    for side, sums in enumerate(triton_sweeps.pair_row_sums(pairs, scales[local], limits=SMALL)):
        logits = (wide_scales[:, side, None] * (s, s.T)[side]).masked_fill(eye, -torch.inf)[local]
        means = (torch.softmax(logits, 1) * logits.nan_to_num(neginf=0.0)).sum(1)
        assert_close(sums, (torch.logsumexp(logits, 1), means), dtype, "sums")
    shifts = [scales[:, side] + ramp(-1, 2, world) for side in range(2)]
    wide_shifts = [shift.double().cpu() for shift in shifts]
    weights = (wide_scales[:, :1] * s - wide_shifts[0][:, None]).exp() + (wide_scales[:, 1] * s - wide_shifts[1]).exp()
    weights.masked_fill_(eye, 0.0)
    gradients = triton_sweeps.pair_gradients(pairs, scales, *shifts, exclude_diagonal=True, limits=SMALL)
    expected = (weights @ wide.world_text)[local], (weights.T @ wide.world_image)[local]
    assert_close(gradients, expected, dtype, "gradients")


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_ranks_block(dtype: torch.dtype) -> None:
    """No partner in it, and tables of that rank's rows before this one's: against torch's functions, in float64."""
    mine, theirs = make_pairs(33, slice(0, 33), 24, dtype), make_pairs(33, slice(0, 33), 24, dtype)
    theirs = PairFeatures.single(theirs.image.flip(0), theirs.text.flip(1))
    block = Block(mine.image, mine.text, theirs.image, theirs.text, 33, owner=1)
    wide, scale, bias = block.to(torch.float64), scalar(20.0), scalar(-9.0)
    sums = triton_sweeps.pair_logsumexp(block, scale, exclude_diagonal=True, limits=SMALL)
    assert_close(sums, tiled.pair_logsumexp(wide, scale.double(), exclude_diagonal=True), dtype, "sums")
    tables = ramp(18, 21, 66), ramp(21, 19, 66)
    gradients = triton_sweeps.pair_gradients(block, scale, *tables, exclude_diagonal=True, limits=SMALL)
    expected = tiled.pair_gradients(wide, scale.double(), *(t.double() for t in tables), exclude_diagonal=True)
    assert_close(gradients, expected, dtype, "gradients")
    found = triton_sweeps.pair_sigmoids(block, scale, bias, limits=SMALL)
    expected = sigmoid.pair_sigmoids(wide, scale.double(), bias.double())
    assert_close(found[2:], expected[2:], dtype, "gradients")
    torch.testing.assert_close(torch.stack(found[:2]).double(), torch.stack(expected[:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("world", "local", "dim"), PROBLEMS)
def test_sigmoids(world: int, local: slice, dim: int, dtype: torch.dtype) -> None:
    """Against autograd through SigLIP's own formula: the sums, and both gradients."""
    pairs, scale, bias = make_pairs(world, local, dim, dtype), scalar(15.0), scalar(-9.0)
    wide = exact(pairs)
    s = (wide.world_image @ wide.world_text.T).requires_grad_()
    k, c = scale.double().cpu().requires_grad_(), bias.double().cpu().requires_grad_()
    terms = -F.logsigmoid((2 * torch.eye(world, dtype=torch.float64) - 1) * (k * s + c))
    loss = terms[local].sum()
    (weight,) = torch.autograd.grad(loss, c, retain_graph=True)
    (slopes,) = torch.autograd.grad(terms.sum() / k, s)
    slopes = slopes.double()
    expected = (slopes @ wide.world_text)[local], (slopes.T @ wide.world_image)[local]
    sums = triton_sweeps.pair_sigmoids(pairs, scale, bias, limits=SMALL)
    torch.testing.assert_close(sums.loss.double().cpu(), loss.detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(sums.weight.double().cpu(), weight.reshape(()), rtol=2e-5, atol=1e-5)
    assert_close((sums.image_gradient, sums.text_gradient), expected, dtype, "gradients")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_any_chunks(data: st.DataObject) -> None:
    world, dim = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, world - 1))
    local = slice(first, data.draw(st.integers(first + 1, world)))
    dtype, exclude = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    limits = ChunkLimits(
        edge=data.draw(st.integers(9, 64)),
        height=data.draw(st.integers(9, 64)),
        weight_bytes=data.draw(st.integers(400, 8000)),
        split_depth=data.draw(st.integers(4, 64)),
    )
    pairs, scale = make_pairs(world, local, dim, dtype), scalar(data.draw(st.sampled_from([0.1, 7.0, 30.0])))
    wide, wide_scale = exact(pairs), scale.double().cpu()
    rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=exclude, limits=limits)
    assert_close(rows, reference.pair_logsumexp(wide, wide_scale, exclude_diagonal=exclude), dtype, "sums")
    shifts = [ramp(0, 2, world) + scale for _ in range(2)]
    gradients = triton_sweeps.pair_gradients(pairs, scale, *shifts, exclude_diagonal=exclude, limits=limits)
    expected = reference.pair_gradients(wide, wide_scale, *(s.double().cpu() for s in shifts), exclude_diagonal=exclude)
    assert_close(gradients, expected, dtype, "gradients")


@pytest.mark.parametrize(("world", "local", "dim"), PROBLEMS)
def test_equal_to_the_torch_path(world: int, local: slice, dim: int) -> None:
    pairs, scale = make_pairs(world, local, dim), scalar(25.0)
    mine = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True, limits=SMALL)
    theirs = tiled.pair_logsumexp(pairs, scale, exclude_diagonal=True, tile_size=16)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    shifts = ramp(25, 26, world), ramp(26, 25, world)
    mine = triton_sweeps.pair_gradients(pairs, scale, *shifts, exclude_diagonal=True, limits=SMALL)
    theirs = tiled.pair_gradients(pairs, scale, *shifts, exclude_diagonal=True, tile_size=16)
    torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-6)
    mine = triton_sweeps.pair_sigmoids(pairs, scale, scalar(-10.0), limits=SMALL)
    theirs = sigmoid.pair_sigmoids(pairs, scale, scalar(-10.0), tile_size=16)
    torch.testing.assert_close(tuple(mine), tuple(theirs), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_sure_positive_pair_keeps_its_digits(dtype: torch.dtype) -> None:
    """Near the optimum the positive's weight all but cancels: bf16's 8 bits of it would be an error as large as
    the gradient."""
    features = make_pairs(20, slice(0, 20), 48, dtype).image
    pairs, scale, bias = PairFeatures.single(features, features), scalar(20.0), scalar(-15.0)
    wide = exact(pairs)
    sums = triton_sweeps.pair_sigmoids(pairs, scale, bias)
    expected = sigmoid.pair_sigmoids(wide, scale.double().cpu(), bias.double().cpu())
    assert expected.image_gradient.abs().max() < 0.01
    assert_close(tuple(sums[2:]), tuple(expected[2:]), dtype, "gradients")


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1000.0])
def test_extreme_temperatures(scale: float) -> None:
    pairs = make_pairs(29, slice(0, 29), 32, torch.bfloat16)
    rows = triton_sweeps.pair_logsumexp(pairs, scalar(scale), exclude_diagonal=True, limits=SMALL)
    expected = reference.pair_logsumexp(exact(pairs), torch.tensor([scale]).double(), exclude_diagonal=True)
    for mine, theirs in zip(rows, expected):
        torch.testing.assert_close(mine.double().cpu(), theirs, rtol=1e-6, atol=2e-5)


def test_a_pair_without_negatives_has_an_empty_sum() -> None:
    pairs = make_pairs(1, slice(0, 1), 16)
    for side in triton_sweeps.pair_logsumexp(pairs, scalar(10.0), exclude_diagonal=True):
        assert side.tolist() == [-torch.inf]
    for side in triton_sweeps.pair_row_sums(pairs, torch.full((1, 2), 10.0, device=DEVICE)):
        assert (side.logsumexp.tolist(), side.mean.tolist()) == ([-torch.inf], [0.0])


def test_the_same_bits_every_time() -> None:
    pairs, scale = make_pairs(41, slice(0, 41), 32, torch.bfloat16), scalar(20.0)
    runs = []
    for _ in range(2):
        rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True, limits=SMALL)
        runs.append([*rows, *triton_sweeps.pair_gradients(pairs, scale, *rows, exclude_diagonal=False, limits=SMALL)])
    for first, second in zip(*runs):
        assert torch.equal(first, second)


def test_rows_that_are_not_contiguous() -> None:
    image, text = torch.randn(2, 33, 2 * 24, device=DEVICE).unbind()
    pairs, scale = PairFeatures.single(image[:, ::2], text[:, 1::2]), scalar(1.0)
    expected = reference.pair_logsumexp(exact(pairs), scale.double().cpu(), exclude_diagonal=True)
    rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True, limits=SMALL)
    assert_close(rows, expected, torch.float32, "sums")


@pytest.mark.parametrize("world", [64, 77])
def test_long_sums_of_few_rows_are_divided(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a rank with a small part of a large batch."""
    divided = []
    original = triton_chunks.num_splits
    monkeypatch.setattr(triton_chunks, "num_splits", lambda *args: divided.append(original(*args)) or divided[-1])
    pairs, scale = make_pairs(world, slice(20, 32), 16), scalar(10.0)
    shifts = ramp(8, 11, world), ramp(11, 9, world)
    limits = ChunkLimits(height=12, weight_bytes=12 * 128 * 4, split_depth=16)
    gradients = triton_sweeps.pair_gradients(pairs, scale, *shifts, exclude_diagonal=True, limits=limits)
    expected = reference.pair_gradients(
        exact(pairs), scale.double().cpu(), *(s.double().cpu() for s in shifts), exclude_diagonal=True
    )
    assert_close(gradients, expected, torch.float32, "gradients")
    assert divided == [4, 4]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU tunes real blocks: test_tuned_blocks_on_a_gpu")
@pytest.mark.long
@pytest.mark.parametrize("winner", [0, 1, 2])
def test_measuring_blocks_leaves_no_trace(winner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own tuner runs every candidate on the real tensors before the one that counts."""
    blocks = [Blocks(16, 64, 32, 4, 1), Blocks(64, 16, 16, 4, 1), Blocks(32, 32, 32, 4, 1)]
    measured = []

    def measure(run: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        run()
        measured.append(len(measured) % 3)
        return [float(measured[-1] != winner)] * 3

    monkeypatch.setattr(triton_blocks, "tunes", lambda smallest_edge: True)
    monkeypatch.setattr(triton_blocks, "candidates", lambda name, item_size: blocks)
    monkeypatch.setattr(triton_blocks.triton, "autotune", partial(triton_blocks.triton.autotune, do_bench=measure))
    triton_blocks.tuned.cache_clear()
    try:
        pairs, scale = make_pairs(37, slice(0, 37), 20, torch.bfloat16), scalar(20.0)
        rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True, limits=SMALL)
        sides = triton_sweeps.pair_row_sums(pairs, scale.expand(37, 2).contiguous(), limits=SMALL)
        gradients = triton_sweeps.pair_gradients(pairs, scale, *rows, exclude_diagonal=True, limits=SMALL)
        sums = triton_sweeps.pair_sigmoids(pairs, scale, -scale, limits=SMALL)
    finally:
        triton_blocks.tuned.cache_clear()
    wide, wide_scale = exact(pairs), scale.double().cpu()
    assert_close(rows, reference.pair_logsumexp(wide, wide_scale, exclude_diagonal=True), torch.bfloat16, "sums")
    for side, expected in zip(sides, tiled.pair_row_sums(wide, wide_scale.expand(37, 2))):
        assert_close(tuple(side), tuple(expected), torch.bfloat16, "sums")
    expected = reference.pair_gradients(
        wide, wide_scale, *(side.double().cpu() for side in rows), exclude_diagonal=True
    )
    assert_close(gradients, expected, torch.bfloat16, "gradients")
    exact_sums = sigmoid.pair_sigmoids(wide, wide_scale, -wide_scale)
    torch.testing.assert_close(sums.loss.double().cpu(), exact_sums.loss, rtol=1e-5, atol=0)
    assert_close(tuple(sums[2:]), tuple(exact_sums[2:]), torch.bfloat16, "gradients")
    assert len(measured) >= 3 * 5  # both forms of sums, exponentials, sigmoids, products


@pytest.mark.skipif(DEVICE.type != "cuda", reason="blocks are measured on a GPU only")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tuned_blocks_on_a_gpu(dtype: torch.dtype) -> None:
    world = 2 * triton_blocks.TUNED_FROM + 40
    pairs, scale = make_pairs(world, slice(0, world), 128, dtype), scalar(20.0)
    wide, wide_scale = pairs.to(torch.float64), scale.double()
    rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True)
    expected = tiled.pair_logsumexp(wide, wide_scale, exclude_diagonal=True)
    assert_close(rows, expected, dtype, "sums")
    gradients = triton_sweeps.pair_gradients(pairs, scale, *rows, exclude_diagonal=True)
    expected = tiled.pair_gradients(wide, wide_scale, *(side.double() for side in rows), exclude_diagonal=True)
    assert_close(gradients, expected, dtype, "gradients")
    assert_close(
        tuple(triton_sweeps.pair_sigmoids(pairs, scale, -scale)[2:]),
        tuple(sigmoid.pair_sigmoids(wide, wide_scale, -wide_scale)[2:]),
        dtype,
        "gradients",
    )


def test_losses_of_sure_negatives_keep_their_digits() -> None:
    """softplus(-20) is 2e-9: 1 + 2e-9 is 1 in fp32."""
    pairs = make_pairs(20, slice(0, 20), 16)
    weights = torch.empty(20, 20, device=DEVICE)
    operands = Operands(pairs.image, pairs.text, "tf32x3")
    loss, weight = chunk_sigmoids(operands, weights, scalar(4.0), scalar(-20.0), 20)
    z = 4 * exact(pairs).image @ exact(pairs).text.T - 20
    torch.testing.assert_close(loss.double().cpu(), F.softplus(z).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.double().cpu(), z.sigmoid().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_features_obey_torch_s_matmul_precision(precision: str) -> None:
    pairs, scale = make_pairs(33, slice(4, 30), 64), scalar(10.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True, limits=SMALL)
    finally:
        torch.set_float32_matmul_precision(before)
    of = make_pairs(33, slice(4, 30), 64, torch.bfloat16) if precision == "medium" else pairs
    expected = reference.pair_logsumexp(exact(of), scale.double().cpu(), exclude_diagonal=True)
    limit = 2e-3 if precision == "high" and DEVICE.type == "cuda" else 2e-5
    for mine, theirs in zip(rows, expected):
        torch.testing.assert_close(mine.double().cpu(), theirs, rtol=0, atol=limit)


def test_no_square_matrix_is_allocated() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                self.elements = max(self.elements, out.numel())
            return out

    pairs, scale = make_pairs(90, slice(0, 90), 16, torch.bfloat16), scalar(10.0)
    limits = ChunkLimits(edge=64, height=32, weight_bytes=2 * 32 * 40)
    with Largest() as largest:
        rows = triton_sweeps.pair_logsumexp(pairs, scale, exclude_diagonal=True, limits=limits)
        triton_sweeps.pair_gradients(pairs, scale, *rows, exclude_diagonal=True, limits=limits)
    assert largest.elements == 90 * 16


def test_a_diagonal_outside_the_chunk_excludes_nothing() -> None:
    """What `chunks` gives a kernel for rows whose positives lie 2^31 and more columns away."""
    pairs = make_pairs(20, slice(0, 20), 16)
    operands = Operands(pairs.image, pairs.text, "ieee")
    sums = Sums.empty(pairs.image, 20, 20)
    join_chunk(sums, operands, scalar(5.0), 20, exclude_diagonal=True)
    expected = reference.pair_logsumexp(exact(pairs), torch.tensor([5.0]).double(), exclude_diagonal=False)
    assert sums.columns is not None
    assert_close((sums.rows, sums.columns), expected, torch.float32, "sums")
