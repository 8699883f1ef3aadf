"""What a rank holds while features travel around the ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from measuring import Watch
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.config import ObjectiveConfig, load_recipe
from neuclip_scale.objectives.registry import Problem, create_objective
from neuclip_scale.planning import plan_memory
from neuclip_scale.similarity import PairFeatures, RingPairs

pytestmark = pytest.mark.distributed


NAMES = ("openclip", "siglip", "rgcl-g")
OF_FEATURES = ("travelling features", "gathered features", "feature gradients", "similarity tiles")


def test_a_rank_holds_what_is_planned() -> None:
    """Beside its own features; a model whose features outweigh all else would be too slow for a test."""
    measured = run_ranks(4, peaks)[0]
    for name in NAMES:
        options = {"objective.name": name, "train.global_batch_size": 4 * 1024, "model.preset": "toy"}
        options |= {"objective.tile_size": 256}
        planned = []
        for exchange in ("ring", "gather"):
            plan = plan_memory(load_recipe("demo", options | {"objective.exchange": exchange}), 4, device="cpu")
            planned.append(sum(item.device for item in plan.items if item.name in OF_FEATURES))
        assert measured[name] == pytest.approx(planned, rel=0.15)
        assert measured[name][0] < measured[name][1]


def peaks() -> dict[str, list[int]]:
    """Bytes that objectives add at most to this rank's 1024 pairs of width 64, in a ring and gathered."""
    image, text = (F.normalize(torch.randn(1024, 64)) for _ in range(2))
    index, scale = torch.arange(4 * 1024), torch.tensor([10.0])
    found: dict[str, list[int]] = {name: [] for name in NAMES}
    for name, ring in itertools.product(NAMES, (True, False)):
        objective = create_objective(ObjectiveConfig(name=name, tile_size=256), Problem(embed_dim=64))
        with Watch() as watch:
            scale.add(1), image.add(1), text.add(1), index.add(1)  # seen: they do not count
            before = watch.live
            gather = distributed.all_gather_rows
            if ring:
                pairs: PairFeatures = RingPairs.local(image, text)
            else:
                pairs = PairFeatures(image, text, gather(image), gather(text), distributed.rank() * 1024)
            objective(pairs, scale, index)
            found[name].append(watch.peak - before)
            del pairs
    return found
