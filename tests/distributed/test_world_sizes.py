"""The same run on 1, 2 and 4 gloo ranks: the same losses, weights, normalizers and data."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.objectives.registry import OBJECTIVES

STEPS = 5
STATES = ("openclip", "fastclip-v2", "neuclip", "neuclip-queue", "amorlip")
"""One objective of each kind of state: none, tables, networks, a queue."""


def recipe(folder: Path, run: str, objective: str, **overrides: Any) -> Recipe:
    values = {
        "run_dir": str(folder / run),
        "data.train": str(folder / "shards"),
        "model.preset": "toy",
        "data.num_workers": 0,
        "data.num_streams": 4,
        "data.shuffle_window": 8,
        "evaluation.data": "",
        "evaluation.normalizer_every_steps": 0,
        "objective.name": objective,
        "objective.tile_size": 5,  # ragged for every local batch below
        "objective.npn.num_prototypes": 40,
        "objective.npn.restart_every": 2,
        "objective.gamma_decay_epochs": 3,
        "objective.queue.size": 37,  # ragged on every number of ranks
        "objective.amortized.blend_epochs": 2,
        "optim.warmup_steps": 2,
        # Adam divides by |g| + eps: where a gradient is nearly zero, eps = 1e-6 turns rounding into whole updates.
        "optim.eps": 1e-3,
        "train.global_batch_size": 24,
        "train.num_steps": STEPS,
        "checkpoint.every_steps": 0,
    }
    return load_recipe("demo", {**values, **overrides})


def train_all(folder: str, label: str, overrides: dict[str, Any], objectives: Collection[str]) -> dict[str, Any]:
    """Train these objectives; returns weights, objective state and logged steps by name.

    A run's folder, 100 MB of checkpoints, goes when it is done, unless the label is `elastic`.
    """
    import json
    import shutil

    from neuclip_scale.trainer import Trainer

    results = {}
    for objective in objectives:
        config = recipe(Path(folder), f"{label}-{objective}", objective, **overrides)
        trainer = Trainer(config)
        trainer.fit()
        lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines() if distributed.is_main() else []
        results[objective] = {
            "weights": {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()},
            "objective": {k: v for k, v in trainer.objective.state_dict().items() if isinstance(v, torch.Tensor)},
            "table": trainer.objective.rank_state(),
            "steps": [json.loads(line) for line in lines],
        }
        if distributed.is_main() and label != "elastic":
            shutil.rmtree(config.run_dir)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world-sizes")
    # 50 pairs, 24 a step: the steps reach into the third epoch, so the u table is revisited
    write_synthetic_shards(path / "shards", num_samples=50, samples_per_shard=17, image_size=40, seed=1)
    return path


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return train_all(str(folder), "single", {}, OBJECTIVES)


def assert_same_state(value: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To 1e-4; but for AmorLIP's networks, whose Adam makes a whole step of the rounding of a gradient that is zero:
    there one weight in ten thousand may be a step or so away.
    """
    apart = ~torch.isclose(value, expected, rtol=1e-4, atol=2e-5)
    allowed = value.numel() // 10_000 if name.startswith("amorlip") else 0
    assert int(apart.sum()) <= allowed, name
    assert not apart.any() or (value - expected).abs().max() < 2e-3, name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "micro", "objectives"),
    [(2, 5, tuple(OBJECTIVES)), pytest.param(4, 0, STATES, marks=pytest.mark.long)],
)
def test_more_ranks_make_the_same_updates(
    folder: Path, single: dict[str, Any], world_size: int, micro: int, objectives: Collection[str]
) -> None:
    """Also with uneven micro-batches (12 = 5 + 5 + 2) on two ranks."""
    overrides = {"train.micro_batch_size": micro}
    ranks = run_ranks(world_size, train_all, str(folder), f"world{world_size}", overrides, objectives)
    for objective in objectives:
        expected, steps = single[objective], ranks[0][objective]["steps"]
        assert [s["batch_digest"] for s in steps] == [s["batch_digest"] for s in expected["steps"]]
        torch.testing.assert_close(
            torch.tensor([s["loss"] for s in steps]),
            torch.tensor([s["loss"] for s in expected["steps"]]),
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip
        for result in ranks:
            for name, weight in result[objective]["weights"].items():
                assert torch.allclose(weight, expected["weights"][name], rtol=0, atol=1e-6), f"{objective} {name}"
            for name, value in result[objective]["objective"].items():
                assert_same_state(value, expected["objective"][name], f"{objective} {name}")
        for name, whole in expected["table"].items():
            parts = [result[objective]["table"][name] for result in ranks]
            for rank, part in enumerate(parts):
                # Moments of tau's gradient are differences of sums, and carry their rounding.
                torch.testing.assert_close(part, whole[rank::world_size], rtol=5e-4, atol=3e-5)
            assert sum(part.numel() for part in parts) == whole.numel(), "each rank holds its share of the table only"
    assert {name for name in OBJECTIVES if single[name]["table"]} == {
        "sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3", "neuclip-queue"
    }  # fmt: skip


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(folder: Path, single: dict[str, Any]) -> None:
    stopped = {"train.num_steps": STEPS, "checkpoint.every_steps": 2, "checkpoint.keep": 3}
    run_ranks(2, train_all, str(folder), "elastic", stopped, STATES)
    for objective in STATES:  # take back the last checkpoint: as if the run had died after step 4
        import shutil

        shutil.rmtree(folder / f"elastic-{objective}" / "checkpoints" / "step_000000005")
    again = train_all(str(folder), "elastic", stopped, STATES)
    for objective in STATES:
        expected = single[objective]
        for name, weight in again[objective]["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=1e-6)
        digests = [s["batch_digest"] for s in again[objective]["steps"]]
        assert digests == [s["batch_digest"] for s in expected["steps"]]


def all_drop_in_gradients() -> dict[str, list[torch.Tensor]]:
    return {objective: drop_in_gradients(objective) for objective in OBJECTIVES}


def drop_in_gradients(objective: str) -> list[torch.Tensor]:
    """Gradients after DDP's averaging, for a linear model on this rank's rows."""
    from torch.nn.functional import normalize
    from torch.nn.parallel import DistributedDataParallel

    from neuclip_scale.losses import create_loss
    from neuclip_scale.normalizers import DatasetFeatures

    torch.manual_seed(0)
    data, index = torch.randn(24, 9, dtype=torch.float64), torch.randperm(60)[:24]
    rows = slice(distributed.rank() * (24 // distributed.world_size()), None)
    rows = slice(rows.start, rows.start + 24 // distributed.world_size())

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = torch.nn.Linear(9, 6), torch.nn.Linear(9, 6)
            self.logit_scale = torch.nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return normalize(self.image(x), dim=1), normalize(self.text(x), dim=1), self.logit_scale.exp()

    model: torch.nn.Module = Towers().double()
    if distributed.world_size() > 1:
        model = DistributedDataParallel(model)
    known = normalize(torch.randn(2, 60, 6, dtype=torch.float64), dim=2)
    loss = create_loss(
        objective, embed_dim=6, dataset_size=60, num_prototypes=10, restart_every=2, tile_size=7,
        encode_dataset=lambda: DatasetFeatures(*known, torch.arange(60)),
    )  # fmt: skip
    for _ in range(3):
        model.zero_grad()
        loss(*model(data[rows]), sample_index=index[rows]).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.distributed
def test_drop_in_losses_give_ddp_the_global_gradient() -> None:
    expected = all_drop_in_gradients()
    for gradients in run_ranks(2, all_drop_in_gradients):
        for objective in OBJECTIVES:
            torch.testing.assert_close(
                gradients[objective], expected[objective], rtol=1e-6, atol=1e-9, msg=lambda m, o=objective: f"{o}: {m}"
            )
