"""What objectives say of their arithmetic, against the products that torch sees them do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from neuclip_scale.config import ObjectiveConfig, parse
from neuclip_scale.normalizers import DatasetFeatures
from neuclip_scale.objectives import Objective, create_objective
from neuclip_scale.objectives.registry import OBJECTIVES, Problem
from neuclip_scale.similarity import (
    BatchShape,
    PairFeatures,
    pair_gradients,
    pair_gradients_flops,
    pair_logsumexp,
    pair_logsumexp_flops,
    pair_row_sums,
    pair_row_sums_flops,
    pair_sigmoids_flops,
)
from neuclip_scale.similarity.sigmoid import pair_sigmoids

B, D, M, TILE = 22, 8, 13, 5  # ragged tiles
SMALL: dict[str, Any] = {
    "npn": {"num_prototypes": M, "updates_per_step": 3, "restart_every": 2},
    "queue": {"size": B},
    "amortized": {"blend_epochs": 0, "updates_per_step": 2, "hidden_factor": 1.5},
    "tile_size": TILE,
}


def count(run: Any) -> int:
    """FLOPs of the products in `run()`; torch's own counter leaves out the ones in place."""
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return int(counter.get_total_flops())


def features(pairs: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return normalize(torch.randn(pairs, D), dim=1), normalize(torch.randn(pairs, D), dim=1)


def objective(name: str) -> Objective:
    image, text = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(2))
    known = DatasetFeatures(normalize(image, dim=1), normalize(text, dim=1), torch.arange(40))
    problem = Problem(
        embed_dim=D, dataset_size=40, num_epochs=3, global_batch_size=B // 2, encode_dataset=lambda: known
    )
    return create_objective(parse(ObjectiveConfig, {"name": name, **SMALL}), problem)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_one_process_does_what_its_objective_says(name: str) -> None:
    chosen, scale, index = objective(name), torch.tensor([12.0]), torch.arange(B)
    pairs = PairFeatures.single(*features())
    for _ in range(2):  # the second step finds a queue that is full; neuclip restarts in the third
        chosen(pairs, scale, index, torch.tensor([-9.0]))
    counted = count(lambda: chosen(pairs, scale, index, torch.tensor([-9.0])))
    assert counted == chosen.flops(BatchShape(B, B, D))


def test_the_least_is_four_products() -> None:
    product = 2 * B * B * D
    whole = BatchShape(B, B, D)
    assert objective("openclip").flops(whole) == 4 * product
    assert objective("siglip").flops(whole) == 3 * product
    assert objective("isogclr").flops(whole) == 5 * product
    npn = 2 * (2 * 3 + 1) * 2 * B * M * D
    assert objective("neuclip").flops(whole) == 4 * product + npn
    assert objective("neuclip-queue").flops(whole) == 4 * product + 2 * B * B * (2 * D + 3 * 2)  # two horizons


@pytest.mark.parametrize("first", [0, 11])
def test_a_rank_of_several_does_its_rows_in_both_directions(first: int) -> None:
    image, text = features()
    rows, scale, shift = slice(first, first + 11), torch.tensor([12.0]), torch.zeros(B)
    pairs = PairFeatures(image[rows], text[rows], image, text, first)
    shape = BatchShape(11, B, D)
    scales = torch.full((11, 2), 12.0)
    counted = {
        pair_logsumexp_flops: count(lambda: pair_logsumexp(pairs, scale, exclude_diagonal=True, tile_size=TILE)),
        pair_row_sums_flops: count(lambda: pair_row_sums(pairs, scales, tile_size=TILE)),
        pair_gradients_flops: count(
            lambda: pair_gradients(pairs, scale, shift, shift, exclude_diagonal=True, tile_size=TILE)
        ),
        pair_sigmoids_flops: count(lambda: pair_sigmoids(pairs, scale, torch.zeros(1), tile_size=TILE)),
    }
    for said, seen in counted.items():
        assert said(shape) == seen
    assert objective("openclip").flops(shape) == 6 * 2 * 11 * B * D
