"""The queue's kernels against its torch path in float64. Run by test_triton.py, in a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton_problems import DEVICE, make_pairs, scalar

from neuclip_scale.losses import create_loss
from neuclip_scale.normalizers import (
    EmbeddingQueue,
    ProjectingQueue,
    QueueSums,
    horizons_up_to,
    triton_queue,
    triton_queue_check,
)
from neuclip_scale.normalizers.own_entries import OwnEntries
from neuclip_scale.normalizers.triton_queue import FusedSums, Limits
from neuclip_scale.projection import Projection
from neuclip_scale.similarity import PairFeatures
from neuclip_scale.similarity.choosing import VARIABLE

FAR = 1 << 40
"""Sample indices need 64 bits."""
LIMIT = 3e-4
"""Largest difference of a log-sum that is fp32's rounding, at a scale of 30."""


class Problem(NamedTuple):
    queue: EmbeddingQueue
    pairs: PairFeatures
    index: Tensor
    scale: Tensor

    def double(self) -> Problem:
        """The same numbers in float64, for which torch is chosen."""
        return Problem(
            copy.deepcopy(self.queue).double(), self.pairs.to(torch.float64), self.index, self.scale.double()
        )

    def sums(self, horizons: Tensor) -> QueueSums:
        return self.queue.sums(self.pairs, self.scale, self.index, horizons, tile_size=16)


def make(
    num_anchors: int, pushed: int, size: int, d: int, *, own: str = "some", scale: float = 30.0, rounded: bool = False
) -> Problem:
    """A queue of `size` after `pushed` pairs, a few at a time; entries stand near the anchors of the same index.

    `rounded`: features are bf16's numbers, so that products are exact however fp32 is multiplied.
    """
    generator = torch.Generator().manual_seed(num_anchors + pushed + d)
    pairs, queue = make_pairs(num_anchors, slice(0, num_anchors), d), EmbeddingQueue(d, size, rank=0, world_size=1)
    queue.to(DEVICE)
    whose = torch.randint(num_anchors, (pushed,), generator=generator).to(DEVICE)
    image, text = (
        normalize(side[whose] + torch.randn(pushed, d, generator=generator).to(DEVICE) / d**0.5, dim=1)
        for side in (pairs.text, pairs.image)
    )
    if rounded:
        pairs, image, text = (
            pairs.to(torch.bfloat16).full_precision(),
            image.bfloat16().float(),
            text.bfloat16().float(),
        )
    index = torch.arange(num_anchors, device=DEVICE) + FAR
    entries = {"some": whose + FAR, "none": whose + 2 * FAR, "all": torch.full_like(whose, FAR + 1)}[own]
    for rows in torch.arange(pushed, device=DEVICE).split(29):
        queue.push(PairFeatures.single(image[rows], text[rows]), entries[rows])
    return Problem(queue, pairs, index, scalar(scale))


@contextmanager
def multiplied(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check(problem: Problem, num_horizons: int, monkeypatch: pytest.MonkeyPatch, limit: float = LIMIT) -> None:
    finite = [3.0 * 1.5**k for k in range(num_horizons - 1)]
    horizons = torch.tensor([*finite, torch.inf], device=DEVICE)
    monkeypatch.setenv(VARIABLE, "auto")
    expected = problem.double().sums(horizons)
    monkeypatch.setenv(VARIABLE, "triton")
    found = problem.sums(horizons)
    assert found.log_sums.dtype == torch.float32
    torch.testing.assert_close(found.log_sums.double(), expected.log_sums, rtol=0, atol=limit)
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "own", "num_horizons"),
    [
        ((45, 70, 70, 24), "some", 5),
        ((45, 61, 100, 24), "some", 1),  # not full yet
        ((33, 150, 97, 64), "none", 8),  # once around, and on
        ((7, 31, 31, 40), "all", 3),
        ((64, 64, 64, 64), "some", 9),
        ((40, 20, 64, 32), "some", 16),
        ((20, 33, 33, 32), "none", 20),
    ],
)
def test_sums(sizes: tuple[int, int, int, int], own: str, num_horizons: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(make(*sizes, own=own), num_horizons, monkeypatch)


@pytest.mark.parametrize(("precision", "limit"), [("high", 1e-3), ("medium", 1e-2)])
def test_products_obey_torch_s_matmul_precision(precision: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """For bf16 the exponentials are rounded too; the interpreter cuts off what a GPU rounds."""
    problem = make(45, 70, 90, 24, rounded=True)
    with multiplied(precision):
        check(problem, 4, monkeypatch, limit)
        assert (problem.queue._rounded_image._copy is not None) == (precision == "medium")
        problem.queue.push(make_pairs(31, slice(0, 31), 24).to(torch.bfloat16).full_precision(), problem.index[:31])
        check(problem, 2, monkeypatch, limit)
    if precision == "medium":
        assert not torch.equal(problem.sums(scalar(9.0)).log_sums, medium_sums(problem))


def medium_sums(problem: Problem) -> Tensor:
    with multiplied("medium"):
        return problem.sums(scalar(9.0)).log_sums


def test_nothing_to_sum_is_the_log_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty queue, and an anchor that owns every entry, in several strips or none."""
    monkeypatch.setattr(triton_queue, "LIMITS", Limits(programs=8))
    monkeypatch.setenv(VARIABLE, "triton")
    horizons = torch.tensor([10.0, torch.inf], device=DEVICE)
    for problem, empty in ((make(5, 0, 20, 24), slice(0, 5)), (make(5, 40, 40, 24, own="all"), slice(1, 2))):
        log_sums, weights = problem.sums(horizons)
        assert (log_sums[empty] == -torch.inf).all()
        assert (weights[empty].abs() < 1e-5).all()
        assert not log_sums.isnan().any()
        assert log_sums[2:].isfinite().all() == (empty.stop == 2)


@pytest.mark.parametrize("programs", [1, 4, 64])
def test_strips_do_not_change_the_sums(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(45, 170, 170, 24)
    positives, weights = problem.pairs.world_positives(), problem.queue.weights_of(scalar(50.0))
    own = OwnEntries(problem.queue.index, problem.index)
    fused = FusedSums(positives, problem.scale, own, weights, Limits(programs))
    found = fused.log_sums(problem.pairs.world_image, problem.queue.text, problem.queue._rounded_text)
    expected = problem.double().sums(scalar(50.0)).log_sums[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=LIMIT)
    if DEVICE.type == "cpu":
        assert fused._strips(45) == {1: (192, 1), 4: (96, 2), 64: (32, 6)}[programs]


def test_far_logits_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and strips whose largest logits differ by more than fp32's exponents hold; the largest is left out."""
    monkeypatch.setattr(triton_queue, "LIMITS", Limits(programs=4))
    problem = make(20, 128, 128, 32, scale=200.0)
    for first, factor in ((0, 1.0), (32, -1.0), (64, -1.0), (96, 1.0)):
        noise = 1e-2 * torch.randn(32, 32, generator=torch.Generator().manual_seed(first)).to(DEVICE)
        problem.queue.text[first : first + 32] = factor * problem.pairs.image[0] + noise
    check(problem, 3, monkeypatch, 2e-3)
    problem.queue.index[:] = problem.index[0]
    problem.queue.index[40] = FAR * 3
    check(problem, 3, monkeypatch, 2e-3)


def test_ranks_parts_join_to_the_whole() -> None:
    """Each of three ranks sums over its slots, for all anchors."""
    whole, horizons = make(21, 70, 64, 32), torch.tensor([20.0, torch.inf], device=DEVICE)
    positives, parts = whole.pairs.world_positives(), []
    for rank in range(3):
        queue = EmbeddingQueue(32, 64, rank=rank, world_size=3).to(DEVICE)
        queue.load_rank_states([whole.queue.rank_state()])
        queue.load_state_dict(whole.queue.state_dict())
        weights = queue.weights_of(horizons)
        fused = FusedSums(positives, whole.scale, OwnEntries(queue.index[: len(weights)], whole.index), weights)
        parts.append(fused.log_sums(whole.pairs.world_text, queue.image, queue._rounded_image))
    expected = whole.double().sums(horizons).log_sums[:, 1]
    torch.testing.assert_close(torch.stack(parts).logsumexp(0).double(), expected, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("d", [640, 768])
def test_wide_embeddings(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(make(9, 20, 20, d), 2, monkeypatch)


def test_sides_of_other_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past pairs mapped anew: the anchors of either side meet what the other tower's last map was given."""
    generator = torch.Generator().manual_seed(0)
    queue = ProjectingQueue((48, 80), 70, rank=0, world_size=1).to(DEVICE)
    for first in range(0, 90, 30):
        pairs = make_pairs(45, slice(0, 45), 24)
        maps = (
            Projection(*(torch.randn(*size, generator=generator).to(DEVICE) for size in ((45, width), (width, 24))))
            for width in queue.widths
        )
        pairs = replace(pairs, projections=tuple(maps))
        index = first + torch.arange(45, device=DEVICE)
        if first:
            check(Problem(queue, pairs, index, scalar(30.0)), 4, monkeypatch, 1e-3)
        queue.push(pairs, index)


def test_the_check_of_a_device_passes_and_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_queue_check, "_ANCHORS", 45)
    monkeypatch.setattr(triton_queue_check, "_ENTRIES", 70)
    for precision in ("highest", "medium"):
        with multiplied(precision):
            assert triton_queue_check.disagreement(DEVICE, torch.float32, 64) == ""
    codes = OwnEntries.codes
    monkeypatch.setattr(OwnEntries, "codes", lambda self: (torch.full_like(codes(self)[0], -1), codes(self)[1]))
    assert "sums of image anchors over a queue are off by" in triton_queue_check.disagreement(DEVICE, torch.float32, 64)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "highest"), ("bfloat16", "highest"), ("float32", "medium")]
)
def test_steps_of_the_objective(dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of steps until the queue has gone around; the horizons' weights move on the way."""
    results: dict[str, list[Tensor]] = {}
    for path in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, path)
        results[path] = []
        loss = create_loss("neuclip-queue", embed_dim=32, dataset_size=50, size=40, global_batch_size=11, eps=1e-8)
        loss.to(DEVICE)
        for step in range(5):
            pairs = make_pairs(11 + step % 2, slice(0, 11), 32, getattr(torch, dtype))
            leaves = [each[:11].clone().requires_grad_() for each in (pairs.world_image, pairs.world_text)]
            leaves.append(torch.tensor([14.0], device=DEVICE, requires_grad=True))
            index = (torch.arange(11) * (step + 2) % 50).to(DEVICE)
            with multiplied(precision):
                value = loss(*leaves, None, index)
                value.backward()
            results[path] += [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        results[path].append(loss.objective.horizon.weights)
    assert len(results["torch"]) == len(results["triton"]) == 5 * 4 + 1
    limit = LIMIT if (dtype, precision) == ("float32", "highest") else 3e-2
    for mine, theirs in zip(results["triton"], results["torch"]):
        largest = float(theirs.abs().max())
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=limit, atol=limit * largest)
    assert results["torch"][-1].shape == (2, len(horizons_up_to(40, 11)))


def test_the_queue_takes_the_kernels_where_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, horizons, found = make(45, 70, 90, 24), torch.tensor([16.0, torch.inf], device=DEVICE), {}
    for path in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, path)
        found[path] = problem.sums(horizons)
    torch.testing.assert_close(found["triton"].log_sums, found["torch"].log_sums, rtol=0, atol=LIMIT)
    assert not torch.equal(found["triton"].log_sums, found["torch"].log_sums)  # another order of sums
    torch.testing.assert_close(found["triton"].weights, found["torch"].weights)
