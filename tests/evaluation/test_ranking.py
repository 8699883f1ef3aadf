"""Ranks, recall and chance against counting by hand in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuclip_scale.evaluation import ranking
from neuclip_scale.evaluation.ranking import chance_at, pessimistic_ranks, recall_at
from neuclip_scale.evaluation.retrieval import retrieval_scores
from neuclip_scale.evaluation.zero_shot import classification_scores


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ranks_by_hand(queries: torch.Tensor, gallery: torch.Tensor, right: list[list[int]]) -> list[int]:
    scores = queries.double().numpy() @ gallery.double().numpy().T
    result = []
    for row, mine in zip(scores, right, strict=True):
        best = max(row[j] for j in mine)
        result.append(sum(1 for j, score in enumerate(row) if j not in mine and score >= best - 1e-6))
    return result


@pytest.mark.parametrize("block_elements", [1, 7, 250, 1 << 24])
def test_ranks_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, block_elements: int) -> None:
    monkeypatch.setattr(ranking, "_BLOCK_ELEMENTS", block_elements)
    queries, gallery = unit(23, 6, 0), unit(61, 6, 1)
    random = np.random.default_rng(3)
    right = [sorted(random.choice(61, size=1 + i % 3, replace=False).tolist()) for i in range(23)]
    padded = torch.tensor([mine + [-1] * (3 - len(mine)) for mine in right])
    assert pessimistic_ranks(queries, gallery, padded).tolist() == ranks_by_hand(queries, gallery, right)


def test_a_constant_model_gets_nothing() -> None:
    same = F.normalize(torch.ones(12, 4), dim=-1)
    ranks = pessimistic_ranks(same, same, torch.arange(12)[:, None])
    assert ranks.tolist() == [11] * 12
    assert recall_at(ranks, 10) == 0.0


def test_not_a_number_gets_nothing() -> None:
    features = unit(6, 4, 0)
    broken = features.clone()
    broken[2] = math.nan
    ranks = pessimistic_ranks(broken, features, torch.arange(6)[:, None])
    assert ranks[2] == 5
    assert pessimistic_ranks(features, broken, torch.arange(6)[:, None])[2] == 5


def test_two_equal_answers_are_one_loss_each() -> None:
    gallery = unit(5, 4, 0)
    gallery[3] = gallery[1]
    assert pessimistic_ranks(gallery, gallery, torch.arange(5)[:, None]).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("num_right", "num_gallery", "k"), [(1, 7, 1), (1, 7, 5), (2, 7, 3), (3, 6, 10), (5, 6, 2)])
def test_chance_by_enumeration(num_right: int, num_gallery: int, k: int) -> None:
    draws = list(itertools.combinations(range(num_gallery), min(k, num_gallery)))
    expected = sum(any(i < num_right for i in draw) for draw in draws) / len(draws)
    assert chance_at(torch.tensor([num_right] * 3), num_gallery, k) == pytest.approx(expected)


def test_chance_of_one_right_answer_is_k_over_n() -> None:
    assert chance_at(torch.ones(4, dtype=torch.int64), 499, 5) == pytest.approx(5 / 499)


def test_retrieval_with_several_captions_against_brute_force() -> None:
    owner = torch.tensor([2, 0, 0, 1, 3, 3, 3, 4, 2, 1, 5])
    images, texts = unit(6, 5, 4), F.normalize(unit(6, 5, 4)[owner] + 0.8 * unit(11, 5, 5), dim=-1)
    captions_of = [(owner == picture).nonzero().flatten().tolist() for picture in range(6)]
    to_text = ranks_by_hand(images, texts, captions_of)
    to_image = ranks_by_hand(texts, images, [[int(picture)] for picture in owner])
    scores = retrieval_scores(images, texts, owner)
    for k in (1, 5, 10):
        assert scores["image_to_text"][f"recall@{k}"] == pytest.approx(np.mean([r < k for r in to_text]))
        assert scores["text_to_image"][f"recall@{k}"] == pytest.approx(np.mean([r < k for r in to_image]))
    assert 0 < scores["image_to_text"]["recall@1"] < 1
    assert scores["chance_text_to_image"]["recall@1"] == pytest.approx(1 / 6)
    assert scores["chance_text_to_image"]["recall@10"] == 1.0
    assert (scores["num_pictures"], scores["num_texts"]) == (6, 11)


def test_classification_scores_by_hand() -> None:
    ranks = torch.tensor([0, 0, 3, 7, 0, 1])
    labels = torch.tensor([0, 0, 0, 0, 1, 3])
    scores = classification_scores(ranks, labels, 8)
    assert scores["top1"] == pytest.approx(3 / 6)
    assert scores["top5"] == pytest.approx(5 / 6)
    assert scores["mean_per_class_recall"] == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert scores["majority"] == pytest.approx(4 / 6)
    assert scores["chance_top1"] == pytest.approx(1 / 8)
    assert scores["chance_top5"] == pytest.approx(5 / 8)
