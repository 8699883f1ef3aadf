"""The NPN's kernels against its torch path in float64. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

import copy
from typing import NamedTuple

import graphs_on_cpu
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton_problems import DEVICE

from neuclip_scale.normalizers import NormalizerPredictionNetwork, triton_npn_check
from neuclip_scale.normalizers.npn import ADAGRAD_EPS
from neuclip_scale.normalizers.triton_npn import FusedBatch, Limits, updates

RATE, TAU = 0.01, 0.05


class Problem(NamedTuple):
    npn: NormalizerPredictionNetwork
    anchors: Tensor
    positives: Tensor
    log_g: Tensor
    index: Tensor | None

    def double(self) -> Problem:
        """The same numbers in float64."""
        rest = [each.double() for each in (self.anchors, self.positives, self.log_g)]
        return Problem(copy.deepcopy(self.npn).double(), *rest, self.index)


def make(num_anchors: int, num_prototypes: int, d: int, *, own: str = "some", eps: float = 1e-6) -> Problem:
    generator = torch.Generator().manual_seed(num_anchors + num_prototypes + d)
    npn = NormalizerPredictionNetwork(d, num_prototypes, eps)
    npn.weight.copy_(torch.randn(num_prototypes, d, generator=generator))  # of any length
    npn.squares.copy_(torch.rand(num_prototypes, d, generator=generator) * 1e-2 + 1e-2)
    npn.prototype_index.copy_(torch.randint(num_anchors, (num_prototypes,), generator=generator) + (1 << 40))
    if own == "all":
        npn.prototype_index.fill_(3 + (1 << 40))
    anchors = normalize(torch.randn(num_anchors, d, generator=generator), dim=1)
    index = None if own == "none" else torch.arange(num_anchors, device=DEVICE) + (1 << 40)
    positives = torch.rand(num_anchors, generator=generator)
    log_g = npn(anchors, positives, TAU).clamp_min(-9) + torch.randn(num_anchors, generator=generator)
    return Problem(npn.to(DEVICE), anchors.to(DEVICE), positives.to(DEVICE), log_g.to(DEVICE), index)


def move(problem: Problem, limits: Limits, num_updates: int = 3) -> NormalizerPredictionNetwork:
    """The network after updates by Triton; its prediction is checked on the way against the sums of an update."""
    npn, anchors, positives, log_g, index = problem
    batch = FusedBatch(npn, anchors, positives, torch.tensor([TAU], device=DEVICE), index, limits)
    target = torch.logaddexp(log_g, torch.full_like(log_g, npn.log_eps))
    for _ in updates(npn, batch, target, num_updates=num_updates, learning_rate=RATE, eps=ADAGRAD_EPS):
        pass
    fresh = FusedBatch(npn, anchors, positives, TAU, index, limits).predict()
    # Its directions are up to date; the interpreter cuts off what a GPU rounds to bf16.
    limit = 1e-5 if batch.directions.dtype == torch.float32 else 0.1
    torch.testing.assert_close(batch.predict(), fresh, rtol=0, atol=limit)
    return npn


def check(problem: Problem, limits: Limits, limit: float = 1e-4) -> None:
    exact, before = problem.double(), problem.npn.weight.double()
    npn = move(problem, limits)
    for _ in exact.npn.updates(*exact[1:3], TAU, *exact[3:], num_updates=3, learning_rate=RATE, tile_size=16):
        pass
    way, squares = exact.npn.weight - before, exact.npn.squares
    assert torch.isfinite(way).all()
    torch.testing.assert_close(npn.weight - before, way, rtol=0, atol=limit * float(way.abs().max()))
    torch.testing.assert_close(npn.squares.double(), squares, rtol=0, atol=limit * float(squares.max()))
    predicted = FusedBatch(npn, *problem[1:3], TAU, problem.index, limits).predict()
    expected = exact.npn(*exact[1:3], TAU, exact.index)
    torch.testing.assert_close(predicted.double(), expected, rtol=0, atol=3 * limit)


@pytest.mark.parametrize(
    ("sizes", "own", "eps"),
    [
        ((45, 70, 24), "some", 1e-6),
        ((45, 70, 24), "none", 0.0),
        ((33, 31, 64), "all", 1e-6),
        ((33, 31, 64), "all", 0.0),
        ((64, 64, 64), "none", 1e-6),
    ],
)
def test_updates_and_predictions(sizes: tuple[int, int, int], own: str, eps: float) -> None:
    check(make(*sizes, own=own, eps=eps), Limits())


@pytest.mark.long
@pytest.mark.parametrize("limits", [Limits(32 * 33 * 4), Limits(split_anchors=32), Limits(64 * 33 * 4, 32)])
def test_anchors_in_chunks_and_sums_in_splits(limits: Limits) -> None:
    """Chunks add to what those before have left; splits are added up."""
    check(make(130, 33, 40), limits)


def test_far_logits_neither_overflow_nor_vanish() -> None:
    """Blocks of prototypes whose largest logits differ by more than fp32's exponents hold."""
    problem = make(33, 96, 64, own="none")
    problem.npn.weight[:32] = problem.anchors[0]
    problem.npn.weight[32:64] = -problem.anchors[0]
    problem.npn.weight += 1e-3 * torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    problem.npn.squares.fill_(1e4)
    exact, tau = problem.double(), 0.008
    batch = FusedBatch(*problem[:3], tau, None)
    total = torch.empty_like(problem.npn.weight)
    target = torch.full_like(problem.log_g, -4.0)
    batch.local_gradient(target, total, 33)
    before = problem.npn.weight.double()
    batch.descend(total, 1e4, 0.0)
    tiles = exact.npn.tiles(*exact[1:3], tau, None, 16)
    gradient = exact.npn.local_gradient(tiles, target.double(), 33)
    expected = -1e4 * gradient / (1e4 + gradient**2).sqrt()
    assert torch.isfinite(expected).all()
    largest = expected.abs().amax(1, keepdim=True).clamp_min(1e-30)
    assert float(((problem.npn.weight - before - expected).abs() / largest).median()) < 1e-3
    torch.testing.assert_close(problem.npn.weight - before, expected, rtol=0, atol=1e-3 * float(largest.max()))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_obey_torch_s_matmul_precision(precision: str) -> None:
    problem = make(45, 70, 24)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        batch = FusedBatch(*problem[:3], TAU, problem.index)
        assert batch.directions.dtype == (torch.bfloat16 if precision == "medium" else torch.float32)
        check(problem, Limits(), limit=5e-2 if precision == "medium" else 1e-2)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_check_of_a_device_passes_and_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_npn_check, "_ANCHORS", 45)
    monkeypatch.setattr(triton_npn_check, "_PROTOTYPES", 70)
    assert triton_npn_check.disagreement(DEVICE, torch.float32, 64) == ""
    descend = FusedBatch.descend
    monkeypatch.setattr(FusedBatch, "descend", lambda self, total, rate, eps: descend(self, total, 0.9 * rate, eps))
    assert "updates of an NPN are off by" in triton_npn_check.disagreement(DEVICE, torch.float32, 64)


@pytest.mark.parametrize("index", [True, False])
def test_the_network_takes_the_kernels_where_they_are_chosen(index: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make(45, 70, 24, own="some" if index else "none"), make(45, 70, 24)
    monkeypatch.setenv("NEUCLIP_SIMILARITY", "triton")
    anchors, positives, log_g, sample_index = first[1:]
    for _ in first.npn.updates(anchors, positives, TAU, log_g, sample_index, num_updates=2, learning_rate=RATE):
        pass
    move(second._replace(index=sample_index), Limits(), num_updates=2)
    assert torch.equal(first.npn.weight, second.npn.weight)
    predicted = first.npn(anchors, positives, TAU, sample_index)
    assert torch.equal(predicted, FusedBatch(first.npn, anchors, positives, TAU, sample_index).predict())
    monkeypatch.setenv("NEUCLIP_SIMILARITY", "torch")
    theirs = first.npn(anchors, positives, TAU, sample_index)
    torch.testing.assert_close(predicted, theirs, rtol=0, atol=1e-4)
    assert not torch.equal(predicted, theirs)  # another order of sums


def test_ranks_parts_add_up_to_the_whole() -> None:
    whole = make(45, 70, 24)
    totals = []
    for rows in (slice(0, 45), slice(0, 20), slice(20, 45)):
        anchors, positives, log_g, index = (each[rows] for each in whole[1:])
        total = torch.full_like(whole.npn.weight, torch.nan)
        FusedBatch(whole.npn, anchors, positives, TAU, index).local_gradient(log_g, total, 45)
        totals.append(total)
    torch.testing.assert_close(totals[1] + totals[2], totals[0], rtol=0, atol=1e-5 * float(totals[0].abs().max()))


@pytest.mark.parametrize("d", [640, 1280])
def test_wide_embeddings(d: int) -> None:
    check(make(9, 20, d), Limits())


def steps(problem: Problem, *, enabled: bool) -> list[Tensor]:
    """Predictions after updates of six steps, and the weights at the end: as often as it takes to record and replay."""
    npn, anchors, positives, log_g, index = problem
    npn.replays.enabled = enabled
    found: list[Tensor] = []
    for step in range(6):
        size = 45 if step != 3 else 30  # a last, smaller batch
        batch = [each[:size] for each in (anchors.roll(step, 0), positives.roll(step), log_g.roll(2 * step))]
        now = None if index is None else index.roll(step)[:size]
        tau = torch.tensor([TAU * (1 + step / 5)], device=DEVICE)
        if step == 4:
            npn.restart(anchors.repeat(2, 1)[: npn.num_prototypes], torch.arange(70, device=DEVICE) + (1 << 40))
        for _ in npn.updates(*batch[:2], tau, batch[2], now, num_updates=3, learning_rate=RATE):
            pass
        found += [npn(*batch[:2], tau, now), npn(*batch[:2], 0.06, now)]
    return [*found, npn.weight, npn.squares]


@pytest.mark.parametrize("own", ["some", "none"])
def test_replayed_steps_are_those_started_one_by_one(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pairs, temperatures and prototypes in each; to the bit."""
    replayed, single = make(45, 70, 64, own=own), make(45, 70, 64, own=own)
    monkeypatch.setenv("NEUCLIP_SIMILARITY", "triton")
    if DEVICE.type == "cpu":
        graphs_on_cpu.take_the_place_of_cuda(monkeypatch, list(replayed.npn.buffers()))
    found, expected = steps(replayed, enabled=True), steps(single, enabled=False)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    recorded = [each for each in replayed.npn.replays._recordings.values() if each is not None]
    assert len(recorded) == 3  # updates of 45 anchors, predictions of 45 and of 30
    assert not single.npn.replays._recordings


def test_a_copy_has_recordings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(45, 70, 64)
    monkeypatch.setenv("NEUCLIP_SIMILARITY", "triton")
    first.npn.replays.enabled = True
    second = copy.deepcopy(first.npn)
    if DEVICE.type == "cpu":
        graphs_on_cpu.take_the_place_of_cuda(monkeypatch, [*first.npn.buffers(), *second.buffers()])
    for _ in range(3):
        predicted = first.npn(*first[1:3], TAU, first.index)
    third = copy.deepcopy(first.npn)
    assert second.replays.enabled
    assert third.replays.enabled
    assert first.npn.replays._recordings
    assert not third.replays._recordings
    second.weight.neg_()
    for _ in range(3):
        theirs = second(*first[1:3], TAU, first.index)
    assert not torch.equal(theirs, predicted)
    assert torch.equal(first.npn(*first[1:3], TAU, first.index), predicted)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_few_prototypes_of_many_anchors_fit_32_bits(precision: str) -> None:
    """The chunk of anchors is as long as the prototypes are few: what must fit is their weights."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        npn = NormalizerPredictionNetwork(16, 64).to(DEVICE)
        anchors = torch.zeros(1 << 18, 16, device=DEVICE)
        assert FusedBatch(npn, anchors, anchors[:, 0], 0.1, None).height > 1 << 16
    finally:
        torch.set_float32_matmul_precision(before)
